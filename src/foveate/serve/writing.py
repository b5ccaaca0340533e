"""An answer's text while it is written: what can be shown already, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"  # what a tokenizer decodes of a character whose last bytes are yet to come


class Writing:
    """The text of an answer, token by token. White space at both ends is left out, as in `Answer.text`.

    Args:
        tokenizer: of the LLM.
        ends: texts before which the answer is cut off.
        live: whether the pieces are wanted; if not and nothing ends it, the text is decoded once.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[str] = (), live: bool = False) -> None:
        self.tokenizer, self.ends, self.live = tokenizer, tuple(ends), live
        self.shown = ""  # has left already

    def read(self, ids: Sequence[int], last: bool) -> tuple[str, bool]:
        """A new piece of the text, and whether one of `ends` has come.

        Args:
            ids: all tokens so far.
            last: whether no further one comes.
        """
        if not (last or self.live or self.ends):
            return "", False
        text, ended = self.text(ids)
        if not self.live:
            return "", ended
        if not (last or ended):
            text = text[: len(text) - self._held(text)].rstrip()
        piece = text[len(self.shown) :] if text.startswith(self.shown) else ""
        self.shown += piece
        return piece, ended

    def text(self, ids: Sequence[int]) -> tuple[str, bool]:
        """The whole text of these tokens up to the first of `ends`, and whether one of them has come."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        found = [place for end in self.ends if (place := text.find(end)) >= 0]
        return text[: min(found, default=None)].strip(), bool(found)

    def _held(self, text: str) -> int:
        """Characters at the end that may belong to what ends the answer, or change."""
        held = len(text) - len(text.rstrip(HALF))
        for end in self.ends:
            for size in range(min(len(end) - 1, len(text)), held, -1):
                if text.endswith(end[:size]):
                    held = size
                    break
        return held
