"""Two tools for any agent, by the Model Context Protocol: `look` and `ask`.

    look(picture, box, ...)   a region of a picture at its own pixels, within a budget
    ask(picture, question)    a model's answer, with a closer look where it helps

An agent names pictures by path or URL. It is not trusted with the machine: paths must lie in folders that
were allowed, wherever their links lead, and URLs must be allowed at all. What is wrong with a call is told to
it in one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import anyio
from mcp.server.mcpserver import Image as Shown
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from foveate.errors import FoveateError
from foveate.picture.fetching import named, scheme
from foveate.picture.geometry import Box, Size
from foveate.picture.limits import LIMITS, Limits
from foveate.picture.reading import png, read_picture
from foveate.zoom.looking import Budget, Given

INSTRUCTIONS = (
    "Pictures are named by path. To see fine detail, call look with a box around it: you get those pixels as "
    "they are in the original, which a view of the whole picture does not show."
)
Pictured = Annotated[str, Field(description="Path of a picture file.")]
Corners = Annotated[
    list[float] | None,
    Field(
        description="left, top, right, bottom in pixels of the original; without it, the whole picture.",
        min_length=4,
        max_length=4,
    ),
]
Pixels = Annotated[
    int | None, Field(description="Bound on the pixels of what is returned; larger ones are shrunk.", ge=1)
]
Question = Annotated[str, Field(description="A question about the picture.", min_length=1)]


@dataclass(frozen=True)
class Allowed:
    """Which pictures may be read.

    Attributes:
        folders: that paths must lie in; paths that do not start at the root start in the first one.
        urls: whether http and https URLs are fetched.
        limits: on each picture.

    Raises:
        FoveateError: no folder, or one that is not there.
    """

    folders: Sequence[Path]
    urls: bool = False
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        if not self.folders:
            raise FoveateError("give a folder whose pictures may be read")
        for folder in self.folders:
            if not folder.is_dir():
                raise FoveateError(f"there is no folder {folder} whose pictures could be read")

    def place(self, picture: str) -> str | Path:
        """Where a picture that was named may be read. Raises `FoveateError` if it may not."""
        kind = scheme(picture)
        if kind in ("http", "https"):
            if not self.urls:
                raise FoveateError("pictures by URL are not allowed here: give a path")
            return picture
        if kind == "data":
            return picture
        if kind is not None:
            raise FoveateError(f"{named(picture)}: pictures are read from paths, not from {kind}")
        roots = [folder.resolve() for folder in self.folders]
        try:
            path = (roots[0] / picture).resolve()
        except (OSError, ValueError, RuntimeError):  # a name with a zero byte, too long, links in a circle
            raise FoveateError(f"no picture at {named(picture)}") from None
        if not any(path.is_relative_to(root) for root in roots):
            raise FoveateError(f"{named(picture)} is not in a folder whose pictures may be read")
        return path


@dataclass
class Tools:
    """What the tools do.

    Args:
        allowed: which pictures may be read.
        make: makes what answers questions, a `foveate.Zoom`, when the first one is asked.
        budget: bounds on what `look` returns.
        max_new_tokens: bound on an answer.
    """

    allowed: Allowed
    make: Callable[[], Any]
    budget: Budget = field(default_factory=Budget)
    max_new_tokens: int = 256

    @cached_property
    def zoom(self) -> Any:
        return self.make()

    def look(self, picture: str, box: list[float] | None, max_pixels: int | None) -> list[Any]:
        """A region's pixels, and in words which they are."""
        whole = read_picture(self.allowed.place(picture), self.allowed.limits)
        size, region = Size(whole.height, whole.width), Box(0, 0, *whole.size)
        if box is not None:
            proposal = Given((box[0], box[1], box[2], box[3]))(None, whole, "")
            if proposal.box is None:
                raise FoveateError(
                    f"box {box} in a picture of {size.width} x {size.height} pixels: {proposal.problem}"
                )
            region = self.budget.within(proposal.box, size, region) or region
        most = min(max_pixels or self.budget.max_pixels, self.budget.max_pixels)
        bounds = Budget(min_pixels=min(self.budget.min_pixels, most), max_pixels=most)
        crop = bounds.crop(whole, region)
        said = (
            f"{named(picture)} has {size.width} x {size.height} pixels; this is {list(region.rounded())} of "
            f"it, at {crop.width} x {crop.height} pixels."
        )
        return [said, Shown(data=png(crop), format="png")]

    def ask(self, picture: str, question: str) -> dict[str, Any]:
        """An answer, with the regions that it rests on."""
        found = self.zoom.ask(self.allowed.place(picture), question, max_new_tokens=self.max_new_tokens)
        known: dict[str, Any] = found.to_dict()
        return known


def server(tools: Tools) -> MCPServer[Any]:
    """The tools as an MCP server."""
    made: MCPServer[Any] = MCPServer("foveate", instructions=INSTRUCTIONS, log_level="WARNING")
    one_at_a_time = anyio.CapacityLimiter(1)

    async def called(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return await anyio.to_thread.run_sync(lambda: function(*arguments), limiter=one_at_a_time)
        except FoveateError as error:
            raise ToolError(str(error)) from None
        except OSError as error:
            raise ToolError(f"the picture cannot be read: {error.strerror}") from None

    @made.tool(structured_output=False)
    async def look(picture: Pictured, box: Corners = None, max_pixels: Pixels = None) -> list[Any]:
        """Shows a region of a picture at the original's own pixels; small regions are enlarged."""
        result: list[Any] = await called(tools.look, picture, box, max_pixels)
        return result

    @made.tool()
    async def ask(picture: Pictured, question: Question) -> dict[str, Any]:
        """Asks a vision model about a picture. It looks closer where it must, and says where it looked."""
        result: dict[str, Any] = await called(tools.ask, picture, question)
        return result

    return made
