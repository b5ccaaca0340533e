"""Shows an answer on a terminal while it is written."""

from __future__ import annotations

import unicodedata
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase, TextStreamer

PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}


def printable(text: str) -> str:
    """The text without control characters."""
    return "".join(c for c in text if c == "\n" or unicodedata.category(c) != "Cc")


class Live(TextStreamer):
    """A streamer for one answer. White space at both ends is left out, as in `Answer.text`.

    Args:
        tokenizer: the model's.
        console: where the text goes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console
        self.shown = self.held = ""  # held: white space that may end the text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """transformers calls this with each piece of the text."""
        text = printable(self.held + text)
        if not self.shown:
            text = text.lstrip()
        piece = text.rstrip()
        self.held = text[len(piece) :]
        self.shown += piece
        self.console.print(piece, style="bold", end="", **PLAIN)

    def close(self, answer: str) -> None:
        """Ends the line, and shows the answer if it differs from what was streamed."""
        if self.shown:
            self.console.print()
        if not self.shown or self.shown != printable(answer).strip():
            show_text(self.console, answer)


def show_text(console: Console, answer: str) -> None:
    """Prints a whole answer."""
    console.print(printable(answer) or "(no text)", style="bold", **PLAIN)
