"""Why SliME trains in turns: section 2.3 and appendix C of arXiv 2406.08487 as numbers and a plot.

    python examples/bilinear.py [bilinear.png]

The best rank-1 approximation u v^T of X = a b^T + b a^T, with unit vectors a and b and c = a . b, by gradient
descent on u and v at once (eq. 1) and by turns, each solved exactly while the other is fixed. In coordinates
u = A z, A = (a, b), both are small recursions (theorems 3 and 5):

    at once   z <- (1 - eta |u|^2) z + eta M z,  M = (1 c; c 1)
    in turns  z <- M^2 z / (|u|^2 |v|^2)

With the parts tau and nu of z along M's eigenvectors (1, 1) and (1, -1), eigenvalues 1 + c and 1 - c,
descent stands still at tau = 1, nu = 0, which for c > 0 is the optimum, and at tau = 0, nu = 1, the wrong
eigenvector (theorem 4). The second is a saddle: descent ends there from tau = 0, or if a step happens to
take tau to 0, which a start with |u|^2 = 1 + c + 1 / eta does. From anywhere else tau / nu grows, but near
the saddle only by 1 + 2 c eta a step, in turns always by ((1 + c) / (1 - c))^2. From tau = 0 itself turns
escape by rounding alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """Unit vectors a and b in d dimensions with a . b = c."""

    c: float
    d: int = 16
    seed: int = 0

    @property
    def basis(self) -> Vector:
        """A = (a, b), (d, 2)."""
        rng = np.random.default_rng(self.seed)
        q, _ = np.linalg.qr(rng.normal(size=(self.d, 2)))
        return np.stack([q[:, 0], self.c * q[:, 0] + np.sqrt(1 - self.c**2) * q[:, 1]], axis=1)

    @property
    def target(self) -> Vector:
        """X = a b^T + b a^T, (d, d)."""
        a, b = self.basis.T
        return np.outer(a, b) + np.outer(b, a)

    @property
    def m(self) -> Vector:
        return np.array([[1.0, self.c], [self.c, 1.0]])

    def start(self, tau: float, nu: float) -> tuple[Vector, Vector]:
        """u and v of eq. 2 with these parts along (1, 1) and (1, -1)."""
        z = np.array([tau + nu, tau - nu]) / np.sqrt(2)
        return self.basis @ z, self.basis @ z[::-1]

    def coordinates(self, u: Vector) -> Vector:
        """z with u = A z, (2,)."""
        return np.linalg.lstsq(self.basis, u, rcond=None)[0]

    def parts(self, u: Vector) -> tuple[float, float]:
        """tau and nu."""
        alpha, beta = self.coordinates(u)
        return (alpha + beta) / np.sqrt(2), (alpha - beta) / np.sqrt(2)

    def loss(self, u: Vector, v: Vector) -> float:
        return 0.5 * float(((np.outer(u, v) - self.target) ** 2).sum())

    @property
    def least_loss(self) -> float:
        """What the best rank-1 approximation leaves: half the smaller eigenvalue's square."""
        return 0.5 * (1 - abs(self.c)) ** 2


def at_once(
    problem: Problem, u: Vector, v: Vector, eta: float, steps: int
) -> Iterator[tuple[Vector, Vector]]:
    """Gradient descent on both (eq. 1): the iterates, the start included."""
    x = problem.target
    yield u, v
    for _ in range(steps):
        u, v = u - eta * (np.outer(u, v) - x) @ v, v - eta * (np.outer(v, u) - x) @ u
        yield u, v


def in_turns(problem: Problem, u: Vector, steps: int) -> Iterator[tuple[Vector, Vector]]:
    """The best v for u, then the best u for v: pairs (u, best v for it), the start included."""
    x = problem.target
    for _ in range(steps + 1):
        v = x @ u / (u @ u)
        yield u, v
        u = x @ v / (v @ v)


def theorem_3(problem: Problem, z: Vector, u: Vector, eta: float) -> Vector:
    """The next z by eq. 3."""
    return (1 - eta * (u @ u)) * z + eta * problem.m @ z


def theorem_5(problem: Problem, z: Vector, u: Vector, v: Vector) -> Vector:
    return problem.m @ problem.m @ z / ((u @ u) * (v @ v))


def onto_the_saddle(c: float, eta: float) -> tuple[float, float]:
    """tau and nu, equal, from which one step of descent takes tau to zero: |u|^2 = 1 + c + 1 / eta."""
    size = np.sqrt((1 + c + 1 / eta) / 2)
    return size, size


CASES = {
    # start -> c, eta, (tau, nu)
    "an ordinary start": (0.3, 0.1, (0.3, 0.6)),
    "a start near the saddle": (0.05, 0.1, (1e-4, 0.6)),
    "a step onto the saddle": (0.3, 0.4, onto_the_saddle(0.3, 0.4)),
}
STEPS = 60


def main(out: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    table = Table(title=f"after {STEPS} steps; the wrong eigenvector is tau 0, nu 1")
    for column in ("start", "way", "tau", "nu", "loss over the least"):
        table.add_column(column, justify="left" if column in ("start", "way") else "right")
    figure, axes = plt.subplots(1, len(CASES), figsize=(12, 3.6), sharey=True)
    for axis, (name, (c, eta, (tau, nu))) in zip(axes, CASES.items(), strict=True):
        problem = Problem(c)
        u, v = problem.start(tau, nu)
        ways = {
            f"at once, eta {eta}": list(at_once(problem, u, v, eta, STEPS)),
            "in turns": list(in_turns(problem, u, STEPS)),
        }
        for way, pairs in ways.items():
            over = [max(problem.loss(*pair) - problem.least_loss, 1e-12) for pair in pairs]
            axis.semilogy(over, label=way)
            end = [abs(part) for part in problem.parts(pairs[-1][0])]
            end = [part / np.hypot(*end) for part in end]  # turns leave the length of u free
            table.add_row(name, way, f"{end[0]:.4f}", f"{end[1]:.4f}", f"{over[-1]:.1e}")
        axis.set_title(f"{name}, a·b = {c}")
        axis.set_xlabel("step")
        axis.legend()
    axes[0].set_ylabel("loss over the least")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    console = Console()
    console.print(table)
    console.print(f"plot written to {out}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "bilinear.png")
