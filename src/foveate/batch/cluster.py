"""The same over a cluster, by Ray Data: one actor a device, each with a model of its own.

The lines of the questions are dealt out by their places in the file, which all machines read at the same
path, as they read the pictures. Answers come back in order and are written here, so a run that was killed
goes on, with or without a cluster.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from foveate.batch.run import Asking, Line, Work
from foveate.errors import FoveateError, require


class Actor:
    """Answers lines in a process of its own. Made where it runs.

    Args:
        make: opens the model and what asks it.
    """

    def __init__(self, make: Callable[[], Asking]) -> None:
        self.asking = make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        columns = (batch[name].tolist() for name in ("number", "start", "length"))
        lines = [Line(*values) for values in zip(*columns, strict=True)]
        return {"answers": ["\n".join(one) for one in self.asking(lines)]}


def over_cluster(
    make: Callable[[], Asking], batch: int, address: str | None = None, actors: int | None = None
) -> Work:
    """Work by Ray's actors.

    Args:
        make: opens the model and what asks it, on each machine.
        batch: lines that an actor is given at once.
        address: of the cluster; None: that of the environment, or one on this machine.
        actors: how many; by default one for each GPU of the cluster, or one if it has none.

    Raises:
        FoveateError: Ray is not installed, there is no cluster at the address.
    """
    for module, package in (("ray", "ray"), ("ray.data", "ray[data]")):
        require(module, "ray", f"work over a cluster, for its part {package},")
    if actors is not None and actors < 1:
        raise FoveateError(f"actors must be at least 1, not {actors}")

    def work(lines: Iterator[Line]) -> Iterator[list[str]]:
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not ray.is_initialized():
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False)
            except (ConnectionError, ValueError) as error:
                raise FoveateError(f"there is no cluster at {address}: {error}") from error
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        gpus = int(ray.cluster_resources().get("GPU", 0))
        rows = [line._asdict() for line in lines]
        if not rows:
            return
        answers = ray.data.from_items(rows).map_batches(
            Actor,
            fn_constructor_args=(make,),
            batch_size=batch,
            concurrency=actors or max(gpus, 1),
            num_gpus=1 if gpus else 0,
        )
        for row in answers.iter_rows():
            yield row["answers"].split("\n")

    return work
