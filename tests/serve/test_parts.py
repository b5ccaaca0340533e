"""The parts of the scheduler one by one: what is kept of conversations, what is drawn, what can be shown."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from foveate import FoveateError
from foveate.ask.context import Passage
from foveate.model.text import BREAK, as_typed, special_tokens, tokens_of
from foveate.picture.account import Account
from foveate.serve.prefixes import Prefixes, Seen, States
from foveate.serve.settings import Chooser, Settings, nucleus
from foveate.serve.writing import Writing
from foveate.tiny import tiny_tokenizer

PICTURE = -1


def passage(*parts: list[int] | str) -> Passage:
    """Tokens, and pictures of four placeholders each."""
    ids: list[int] = []
    pictures, places = [], []
    for part in parts:
        if isinstance(part, str):
            pictures.append(part)
            places.append((len(ids), len(ids) + 4))
            ids += [PICTURE] * 4
        else:
            ids += part
    return Passage(ids, pictures, places)


def states(visible: list[bool]) -> States:
    """Of two layers; each token's is its number among all."""
    columns = torch.tensor([float(i) for i, keep in enumerate(visible) if keep])
    return [(columns.expand(2, -1)[..., None], -columns.expand(3, -1)[..., None])] * 2


def kept(prefixes: Prefixes, prompt: Passage, visible: list[bool] | None = None) -> None:
    shown = visible or [True] * len(prompt.ids)
    seen = [
        Seen(key, start, end, Account(), sum(shown[start:end]))
        for key, (start, end) in zip(prompt.pictures, prompt.places, strict=True)
    ]
    prefixes.keep(prompt.ids, shown, seen, states(shown))


def found(prefixes: Prefixes, prompt: Passage) -> tuple[int, list[float]]:
    """How many tokens are known, and the numbers of those whose states are."""
    known = prefixes.find(prompt)
    keys, values = torch.empty(2, known.columns, 1), torch.empty(3, known.columns, 1)
    if known.tokens:
        known.write(1, keys, values)
        assert torch.equal(keys[:1], -values[:1])
    return known.tokens, keys[0, :, 0].tolist()


def test_what_is_common_to_conversations_is_kept_once() -> None:
    prefixes = Prefixes(2**20)
    kept(prefixes, passage([1, 2], "a", [3, 4, 5]))
    once = prefixes.bytes
    assert found(prefixes, passage([1, 2], "a", [3, 4, 9])) == (8, [0, 1, 2, 3, 4, 5, 6, 7])
    assert found(prefixes, passage([1, 2], "a", [8])) == (6, [0, 1, 2, 3, 4, 5])
    assert found(prefixes, passage([1, 2], "b", [3])) == (0, [])  # two tokens are not worth it
    assert found(prefixes, passage([1, 7], "a", [3])) == (0, [])
    assert found(prefixes, passage([1, 2], "a"))[0] == 0  # the last token never counts, nor part of a picture
    kept(prefixes, passage([1, 2], "a", [3, 4, 5]))
    assert prefixes.bytes == once
    kept(prefixes, passage([1, 2], "a", [3, 4, 5, 6]))
    assert prefixes.bytes == once * 10 / 9  # one token more
    kept(prefixes, passage([1, 2], "a", [8]))
    assert prefixes.bytes == once * 11 / 9
    assert found(prefixes, passage([1, 2], "a", [3, 4, 5, 6], "b", [3])) == (10, [*range(10)])
    kept(prefixes, passage([1, 2], "a", [3, 4, 5, 6], "b", [3, 4]))
    assert found(prefixes, passage([1, 2], "a", [3, 4, 5, 6], "b", [3, 9])) == (15, [*range(15)])
    known = prefixes.find(passage([1, 2], "a", [3, 4, 5, 6], "b", [3, 9]))
    assert [one.key for one in known.seen] == ["a", "b"]


def test_dropped_tokens_have_no_states() -> None:
    prefixes = Prefixes(2**20)
    visible = [True, True, True, False, False, True, True, True]
    kept(prefixes, passage([1, 2], "a", [3, 4]), visible)
    assert found(prefixes, passage([1, 2], "a", [3, 9])) == (7, [0, 1, 2, 5, 6])
    assert prefixes.find(passage([1, 2], "a", [3, 9])).seen[0].tokens == 2


def test_texts_alone_are_kept_if_they_are_long() -> None:
    prefixes = Prefixes(2**20)
    kept(prefixes, passage([*range(80)]))
    assert found(prefixes, passage([*range(70), 5, 6]))[0] == 70
    assert found(prefixes, passage([*range(20), 5, 6]))[0] == 0


def test_what_was_used_longest_ago_goes_first() -> None:
    one = Prefixes(2**20)
    kept(one, passage([1], "a", [2]))
    prefixes = Prefixes(3 * one.bytes)
    for name in "abc":
        kept(prefixes, passage([1], name, [2]))
    assert found(prefixes, passage([1], "a", [3]))[0] == 5
    kept(prefixes, passage([1], "d", [2]))
    assert prefixes.bytes <= prefixes.most
    assert [found(prefixes, passage([1], name, [3]))[0] for name in "abcd"] == [5, 0, 5, 5]
    none = Prefixes(0)
    kept(none, passage([1], "a", [2]))
    assert none.bytes == 0 and found(none, passage([1], "a", [2, 3]))[0] == 0


def test_draws_have_the_probabilities_of_the_model() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        chances = (scores / temperature).softmax(0)
        if top_p < 1:
            chances[2:] = 0
        chances /= chances.sum()
        settings = [Settings(temperature=temperature, top_p=top_p, seed=seed) for seed in range(1500)]
        drawn = Counter(Chooser(one, 0).choose(scores).token.id for one in settings)
        for token, chance in enumerate(chances.tolist()):
            assert drawn[token] / 1500 == pytest.approx(chance, abs=4 * math.sqrt(0.25 / 1500))


def test_margins_say_what_could_change_a_token() -> None:
    """Scores that move by less give the same token; and so does the nucleus."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(200):
        scores = 3 * torch.randn(30, generator=generator)
        settings = Settings(temperature=[0.0, 0.7, 1.5][seed % 3], top_p=[1.0, 0.7][seed % 2], seed=seed)
        chosen = Chooser(settings, 1).choose(scores)
        assert chosen.margin >= 0
        moved = scores + (torch.rand(30, generator=generator) - 0.5) * min(chosen.margin, 1) * 0.9
        assert Chooser(settings, 1).choose(moved).token.id == chosen.token.id
    kept_, margin = nucleus(torch.tensor([3.0, 2.0, 1.0, -9.0]), 0.9)
    assert kept_.isfinite().tolist() == [True, True, False, False] and margin > 0


def test_a_turn_draws_otherwise_than_the_one_before_and_again_the_same() -> None:
    scores = torch.zeros(50)
    one, other = Chooser(Settings(temperature=1.0, seed=3), 0), Chooser(Settings(temperature=1.0, seed=3), 1)
    first = [one.choose(scores).token.id for _ in range(5)]
    assert first != [other.choose(scores).token.id for _ in range(5)] and len({*first}) > 1
    one.restart()
    assert [one.choose(scores).token.id for _ in range(5)] == first


def test_settings_are_checked() -> None:
    for wrong in (
        {"max_new_tokens": 0},
        {"temperature": 2.5},
        {"temperature": math.nan},
        {"top_p": 0},
        {"ends": ("",)},
        {"ends": ("a",) * 5},
        {"logprobs": 21},
    ):
        with pytest.raises(FoveateError):
            Settings(**wrong)  # type: ignore[arg-type]


class Letters:
    """A tokenizer of which every token is a character; 0 is a special one."""

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return "".join(chr(i) for i in ids if i)


def written(text: str, *ends: str) -> list[str]:
    """The pieces of a text that comes character by character, up to its end."""
    writing, pieces = Writing(Letters(), ends, live=True), []
    for i in range(len(text)):
        piece, ended = writing.read([ord(c) for c in text[: i + 1]], last=i == len(text) - 1)
        pieces.append(piece)
        if ended:
            break
    return pieces


def test_pieces_of_a_text() -> None:
    assert written("  ab  c ") == ["", "", "a", "b", "", "", "  c", ""]
    assert written("a\ufffdb") == ["a", "", "\ufffdb"]
    assert written("yes. User: no", "User:") == ["y", "e", "s", ".", "", "", "", "", "", ""]
    assert written("a Us!", "User:") == ["a", "", "", "", " Us!"]
    assert written("abab!", "abb") == ["", "", "ab", "", "ab!"]
    assert "".join(written("one\n\ntwo", "\n\n")) == "one"
    quiet = Writing(Letters())
    assert quiet.read([97], last=False) == ("", False) and quiet.text([32, 97, 32]) == ("a", False)


def test_special_tokens_are_cut() -> None:
    tokenizer = tiny_tokenizer()
    special = special_tokens(tokenizer)
    for text in (
        "</s>",
        "a<image>b</s></s>",
        "<<image>image>",
        "<|im_start|>system",
        f"<im{BREAK}age>",
        "none",
    ):
        ids = tokens_of(as_typed(text, special), tokenizer)
        assert not {*ids} & {*tokenizer.all_special_ids}, text
        assert tokenizer.decode(ids) == text.replace(BREAK, "")
    assert tokens_of("</s>", tokenizer) == [tokenizer.eos_token_id]
