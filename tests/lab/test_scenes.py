"""Pictures and questions: the same from the same seed, nothing shared between training and test."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from foveate.errors import FoveateError
from foveate.lab.levels import KINDS, LEVELS, Level, level_named
from foveate.lab.materials import LETTERS, TOKENS, WORDS, materials
from foveate.lab.objects import COLOURS
from foveate.lab.questions import ask_about, by_kind, chance, in_scene_guess
from foveate.lab.scenes import CELLS, Scene, make_scene
from foveate.lab.words import lab_tokenizer
from foveate.picture.geometry import Box, Size, tiled

VIEW = 48


def scenes(level: str, split: str = "test", count: int = 60, seed: int = 0) -> list[Scene]:
    return [make_scene(LEVELS[level], VIEW, 1.0, split, seed, i) for i in range(count)]


def questions(level: str, count: int = 150) -> list:
    wanted = LEVELS[level].questions
    return [
        question
        for i, scene in enumerate(scenes(level, count=count))
        for question in ask_about(scene, wanted, np.random.default_rng(i))
    ]


@pytest.mark.parametrize("level", LEVELS)
def test_the_same_seed_makes_the_same_scene(level: str) -> None:
    first, again = scenes(level, count=5), scenes(level, count=5)
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.picture, b.picture) and a.things == b.things
    other = scenes(level, count=5, seed=1)
    assert all(not np.array_equal(a.picture, b.picture) for a, b in zip(first, other, strict=True))


def test_scenes_do_not_depend_on_those_before_them() -> None:
    assert make_scene(LEVELS["easy"], VIEW, 1.0, "train", 0, 7).things == scenes("easy", "train", 8)[7].things


def test_tower_and_training_scenes_differ() -> None:
    assert scenes("easy", "tower", 3)[0].things != scenes("easy", "train", 3)[0].things


def test_training_and_test_share_no_digit_photograph_or_word() -> None:
    train, test = materials("train"), materials("test")

    def drawings(stock: object) -> set[bytes]:
        return {image.tobytes() for images in stock.digits for image in images}  # type: ignore[attr-defined]

    assert sum(map(len, train.digits)) + sum(map(len, test.digits)) == 1797
    assert not drawings(train) & drawings(test)
    assert not set(train.words) & set(test.words)
    assert set(train.words) | set(test.words) == set(WORDS)
    rng = np.random.default_rng(0)
    dealt = [train.word(rng) for _ in range(2000)]
    invented = [word for word in dealt if word not in WORDS]
    assert 0.5 < len(invented) / len(dealt) < 0.7 and len({*invented}) > 0.9 * len(invented)
    assert not {*dealt} & set(test.words) and {test.word(rng) for _ in range(500)} <= set(test.words)
    assert all(3 <= len(word) <= 5 and set(word) <= set(LETTERS) for word in invented)
    for seen, held_out in zip(train.photographs, test.photographs, strict=True):
        columns = {column.tobytes() for column in seen.transpose(1, 0, 2)}
        assert not any(column.tobytes() in columns for column in held_out.transpose(1, 0, 2))


def test_words_have_three_to_five_known_letters() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert all(3 <= len(word) <= 5 and set(word) <= set(LETTERS) for word in WORDS)


def test_no_word_to_train_on_starts_with_a_token_of_the_questions() -> None:
    known = {t.upper() for t in lab_tokenizer().get_vocab() if len(t) > 1 and set(t.upper()) <= set(LETTERS)}
    assert all(token.startswith(TOKENS) for token in known if len(token) <= 5)


@pytest.mark.parametrize("level", LEVELS)
def test_boxes_hold_their_objects(level: str) -> None:
    for scene in scenes(level, count=20):
        side = len(scene.picture)
        assert side == VIEW * LEVELS[level].ratio
        for thing in scene.things:
            left, top, right, bottom = (int(n) for n in thing.box)
            assert 0 < left < right < side + 1 and 0 < top < bottom < side + 1
            pixels = scene.picture[top:bottom, left:right].reshape(-1, 3).astype(int)
            like = np.abs(pixels - COLOURS[thing.colour]).max(1) < 40
            assert like.mean() > 0.3, f"a {thing.colour} {thing.shape} covers {like.mean():.2f} of its box"
            for glyph in thing.glyphs:
                assert glyph.box.left >= left - 2 and glyph.box.right <= right + 2
                assert glyph.box.top >= top - 2 and glyph.box.bottom <= bottom + 2


def test_objects_cross_the_borders_of_tiles() -> None:
    level = LEVELS["easy"]
    tiles = [view.box for view in tiled(0, Size(level.ratio, level.ratio), Size(VIEW, VIEW))]
    things = [thing.box for scene in scenes("easy") for thing in scene.things]

    def inside(box: Box) -> bool:
        return any(
            tile.left <= box.left
            and box.right <= tile.right
            and tile.top <= box.top
            and box.bottom <= tile.bottom
            for tile in tiles
        )

    cut = sum(not inside(box) for box in things) / len(things)
    assert cut > 0.5


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_right(level: str) -> None:
    """Every answer is found again from the objects by a second way."""
    for i, scene in enumerate(scenes(level, count=40)):
        for question in ask_about(scene, LEVELS[level].questions, np.random.default_rng(i)):
            words = question.text.split()
            if question.kind in ("letter", "digit", "word", "where"):
                named = [t for t in scene.things if t.shape in words or t.colour in words]
                assert len(named) == 1
                if question.kind == "where":
                    side = len(scene.picture)
                    x, y = (
                        (named[0].box.left + named[0].box.right) / 2,
                        (named[0].box.top + named[0].box.bottom) / 2,
                    )
                    row, column = divmod(CELLS.index(question.answer), 3)
                    assert column * side / 3 < x < (column + 1) * side / 3
                    assert row * side / 3 < y < (row + 1) * side / 3
                else:
                    assert question.region == named[0].box
                    characters = [glyph.character for glyph in named[0].glyphs]
                    if question.kind == "word":
                        assert question.answer == "".join(characters)
                    else:
                        assert question.answer in characters
            elif question.kind == "count":
                what = words[2]
                count = sum(t.colour == what or what in (f"{t.shape}s", f"{t.shape}es") for t in scene.things)
                assert question.answer == str(len(scene.things) if what == "shapes" else count)
            elif question.kind == "rev":
                holders = [t for t in scene.things if words[4] in (t.letter, t.digit)]
                assert [t.colour for t in holders] == [question.answer]
            elif question.kind == "absent":
                assert question.answer == "none"
                assert not any(t.shape in words or t.colour in words for t in scene.things)
            assert question.answer in question.candidates or question.kind in ("count", "absent")


def test_chance_and_guessing_lines() -> None:
    """Guessing among what is in the scene is worth far more than chance, and far less than reading."""
    asked = questions("easy")
    blind, guess = chance(asked), in_scene_guess(asked)
    assert set(blind) == set(guess) == set(LEVELS["easy"].questions)
    for kind in ("letter", "digit"):
        assert blind[kind] < 0.25
        assert 0.35 < guess[kind] < 0.75
    assert guess["count"] == blind["count"] < 0.5
    one = by_kind(asked)["letter"][:1]
    assert chance(one) == {"letter": 1.0}
    assert in_scene_guess(one)["letter"] == one[0].candidates.count(one[0].answer) / len(one[0].candidates)


def test_questions_are_sampled_without_repetition() -> None:
    scene = scenes("dense", count=1)[0]
    asked = ask_about(scene, {"where": 50, "letter": 50}, np.random.default_rng(0))
    assert len({question.text for question in asked}) == len(asked) > 3


def test_tokenizer_knows_every_question_and_answer() -> None:
    tokenizer = lab_tokenizer()
    for level in LEVELS:
        for question in questions(level, 40):
            ids = tokenizer(f"{question.text} {question.answer}").input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(tokenizer(question.answer).input_ids) == question.answer
            assert len(tokenizer(question.answer).input_ids) == (
                len(question.answer) if question.kind == "word" else 1
            )
    loud, plain = "What letter is on the RED shape?", "what letter is on the red shape ?"
    assert tokenizer(loud).input_ids == tokenizer(plain).input_ids


@pytest.mark.parametrize(
    "wrong", [{"ratio": 1}, {"objects": (4, 2)}, {"glyph": (0, 3)}, {"questions": {"smell": 1}}]
)
def test_wrong_levels_are_refused(wrong: dict) -> None:
    values = {"summary": "", "ratio": 3, "objects": (2, 3), "side": (20, 30), "glyph": (8, 9)}
    with pytest.raises(FoveateError, match=next(iter(wrong))):
        Level(**{**values, **wrong})


def test_unknown_level_is_one_sentence() -> None:
    with pytest.raises(FoveateError, match="unknown level 'hard': choose one of easy"):
        level_named("hard")


def test_every_kind_of_question_is_asked_somewhere() -> None:
    assert Counter(kind for level in LEVELS.values() for kind in level.questions).keys() == set(KINDS)
