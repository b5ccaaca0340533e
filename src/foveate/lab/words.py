"""The lab's tokenizer: whole words of the questions, and letters for what is written in the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from foveate.lab.materials import DIGITS, LETTERS
from foveate.lab.objects import COLOURS, SHAPES
from foveate.lab.scenes import CELLS
from foveate.methods.base import IMAGE_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", IMAGE_TOKEN)
PLACES = ("1st", "2nd", "3rd", "4th", "5th")  # of a letter in its word
QUESTION_WORDS = "what where how many is are on the has letter digit word colour shape shapes there none ? ."


INSTRUCTION_WORDS = "to answer question region of interest in image , : [[ ]] <box> </box>"


def lab_tokenizer() -> PreTrainedTokenizerFast:
    """One token per known word; unknown ones are spelled, so an answer like `cat` has three tokens.

    Upper case is lowered, and question marks need no space before them.
    """
    return _tokenizer([], "?.")


def talking_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokens, followed by those of instructions and boxes, whose numbers are spelled."""
    spelled = [f"##{digit}" for digit in DIGITS]
    return _tokenizer(
        [*INSTRUCTION_WORDS.split(), *spelled], ["?", ".", ",", ":", "[[", "]]", "<box>", "</box>"]
    )


def _tokenizer(more: Sequence[str], marks: Sequence[str]) -> PreTrainedTokenizerFast:
    """`more` tokens come last; `marks` are surrounded by spaces."""
    from transformers import PreTrainedTokenizerFast

    letters, spelled = list(LETTERS.lower()), [f"##{letter}" for letter in LETTERS.lower()]
    plural = [f"{shape}{'es' if shape.endswith('s') else 's'}" for shape in SHAPES]
    words = [
        *QUESTION_WORDS.split(),
        *COLOURS,
        *SHAPES,
        *plural,
        *CELLS,
        *PLACES,
        *DIGITS,
        *letters,
        *spelled,
        *more,
    ]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), *(normalizers.Replace(mark, f" {mark} ") for mark in marks)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[IMAGE_TOKEN],
    )
