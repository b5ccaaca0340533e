"""What a picture may cost before it is refused: pixels, bytes, seconds; and where it may come from."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.errors import FoveateError

DAY = 24 * 60 * 60  # seconds


@dataclass(frozen=True)
class Limits:
    """Bounds on the pictures that are read. They come from the caller alone, never from a model's folder.

    Attributes:
        max_pixels: width x height of a picture; checked before its pixels are decoded.
        max_bytes: of a picture that is fetched from a URL or written out in one.
        seconds: for fetching a picture, redirects included.
        private: whether URLs may lead to addresses that are not public: this machine, a local network.

    Raises:
        FoveateError: a bound that is not above 0.
    """

    max_pixels: int = 2**27
    max_bytes: int = 2**26
    seconds: float = 30.0
    private: bool = False

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_bytes", "seconds"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole or (name == "seconds" and isinstance(value, float))) or not value > 0:
                raise FoveateError(f"{name} must be a number above 0, not {value!r}")
        if self.seconds > DAY:
            raise FoveateError(f"seconds must be at most {DAY}, a day, not {self.seconds}")

    def check(self, name: str, width: int, height: int) -> None:
        """Raises `FoveateError`, whose message starts with `name`, for too many pixels or none."""
        if width < 1 or height < 1:
            raise FoveateError(f"{name} is empty and cannot be read: it has no pixels")
        if width * height > self.max_pixels:
            raise FoveateError(
                f"{name} cannot be read: its {width} x {height} pixels are more than max_pixels "
                f"{self.max_pixels}; make it smaller, or raise max_pixels (foveate.Limits in Python, "
                "--max-pixels on the command line, model.max_pixels in a recipe)"
            )


LIMITS = Limits()
