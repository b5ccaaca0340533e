"""Pre-training of the LLM, the stand-in for Vicuna: a `LlamaForCausalLM` that answers from descriptions.

No picture is involved. A scene is described in one of two ways, and questions and captions follow:

* in words: `red square k top-left .` for every object;
* as bags: tokens whose embedding is the sum of the embeddings of an object's words, each repeated a few times
between noise, like visual tokens. Each letter of a word has its own bags, in order, with its place in the
word; after a cut, as tiles make them, the letters have no places and come in rows, one for each row of
patches. In half of these batches an overview without letters or digits comes first, and most bags after it
have no places in the picture: a view of the whole picture, and then its parts.

A caption is an object's words in any order, the first given: captions teach the LLM to find an object by a
word, while questions alone leave it guessing among all objects. Bags are at random increasing positions with
gaps, up to `LONGEST`: an LLM that has only seen short prefixes makes methods with many visual tokens look bad
unfairly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from foveate.lab.data import CPU
from foveate.lab.levels import LEVELS, Level
from foveate.lab.materials import DIGITS, LETTERS, materials
from foveate.lab.objects import COLOURS, PLAIN, SIGN, Thing
from foveate.lab.optimise import optimiser, warm_cosine
from foveate.lab.packing import Packed, Sample, all_right, encode, pack
from foveate.lab.questions import Question, ask_about, caption
from foveate.lab.scales import Scale
from foveate.lab.scenes import CELLS, Scene
from foveate.lab.words import PLACES
from foveate.picture.geometry import Box

LONGEST = 800  # largest position of a visual token
CROWDED, GAPPED = 0.4, 0.6  # fractions of the steps after which scenes are full, and positions have gaps
IN_WORDS = 0.25  # fraction of the batches
REPEATS = (1, 4)  # times that a bag is repeated
EMPTY = 0.3  # probability of a token of pure noise after a bag
OVERVIEW = 0.5  # fraction of the other batches: a view of everything comes first
PLACED = 0.3  # probability that a bag after an overview has its object's place
CUT = 0.35  # probability that a word is cut
ROWS = (1, 3)  # rows of patches over which the letters after a cut are spread
NOISE = 0.3  # of the embeddings' size
BAG = 5  # most words in a bag


def sketch(level: Level, rng: np.random.Generator, most: int = 99) -> Scene:
    """A scene of one level without its picture, with up to `most` objects: cells are its pixels."""
    stock = materials("train")
    pairs: dict[tuple[str, str], None] = {}
    wanted = int(rng.integers(min(2, level.objects[0]), min(level.objects[1], most) + 1))
    while len(pairs) < wanted:
        shape = SIGN if rng.random() < level.signs else PLAIN[rng.integers(len(PLAIN))]
        pairs[shape, list(COLOURS)[rng.integers(len(COLOURS))]] = None
    things = []
    for shape, colour in pairs:
        row, column = divmod(int(rng.integers(len(CELLS))), 3)
        sign, first = shape == SIGN, rng.random() < 0.5
        thing = Thing(
            shape,
            colour,
            Box(column, row, column + 1, row + 1),
            letter=LETTERS[rng.integers(len(LETTERS))].lower()
            if not sign and (level.both or first)
            else None,
            digit=DIGITS[rng.integers(10)] if not sign and (level.both or not first) else None,
            word=stock.word(rng).lower() if sign else None,
            glyphs=(),
        )
        things.append(thing)
    return Scene(np.zeros((3, 3, 3), dtype=np.uint8), tuple(things))


class Descriptions:
    """Endless batches of described scenes with their questions."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, levels: Sequence[str], seed: int) -> None:
        self.tokenizer = tokenizer
        self.levels = [LEVELS[name] for name in levels]
        self.rng = np.random.default_rng(seed)
        self.ids: dict[str, int] = tokenizer.get_vocab()
        self.known: dict[tuple[str, str], Sample] = {}

    def batch(
        self, size: int, progress: float = 1.0
    ) -> tuple[Tensor, Tensor, list[Scene], list[list[Question]]]:
        """Bags (B, n, BAG) of token ids, -1 for none; increasing positions (B, n); scenes; their questions.

        `progress` is the completed fraction of the pre-training: few objects and dense positions come first.
        """
        most = 99 if progress >= CROWDED else 3 + int(5 * progress / CROWDED)
        in_words, overview = self.rng.random() < IN_WORDS, self.rng.random() < OVERVIEW
        described, scenes, questions = [], [], []
        for _ in range(size):
            level = self.levels[self.rng.integers(len(self.levels))]
            scene = sketch(level, self.rng, most)
            scenes.append(scene)
            things = [scene.things[i] for i in self.rng.permutation(len(scene.things))]
            if in_words:
                described.append([bag for thing in things for bag in _in_words(thing, scene.cell(thing))])
            else:
                described.append(self._bags(scene, things, overview))
            questions.append(ask_about(scene, level.questions, self.rng))
        longest = max(len(bags) for bags in described)
        ids = np.full((size, longest, BAG), -1)
        for b, bags in enumerate(described):
            for i, bag in enumerate(bags):
                ids[b, i, : len(bag)] = [self.ids[word] for word in bag]
        return torch.from_numpy(ids), self._positions(size, longest, progress >= GAPPED), scenes, questions

    def _bags(self, scene: Scene, things: Sequence[Thing], overview: bool) -> list[list[str]]:
        """A scene as a list of tokens, each a list of words whose embeddings are summed."""
        tokens: list[list[str]] = []
        if overview:
            for thing in things:
                self._repeat(tokens, thing, [scene.cell(thing)])
        for thing in things:
            texts = _texts(thing)
            cut = thing.word is not None and self.rng.random() < CUT
            end = int(self.rng.integers(1, len(texts))) if cut else len(texts)
            for text in texts[:end]:
                placed = not overview or self.rng.random() < PLACED
                self._repeat(tokens, thing, [*text, *([scene.cell(thing)] if placed else [])])
            for _ in range(self.rng.integers(ROWS[0], ROWS[1] + 1) if cut else 0):
                for letter, _ in texts[end:]:
                    self._repeat(tokens, thing, [letter], (1, 2))
        return tokens

    def _repeat(
        self, tokens: list[list[str]], thing: Thing, words: list[str], times: tuple[int, int] = REPEATS
    ) -> None:
        for _ in range(self.rng.integers(times[0], times[1] + 1)):
            tokens.append([thing.colour, thing.shape, *words])
            if self.rng.random() < EMPTY:
                tokens.append([])

    def _positions(self, rows: int, count: int, gapped: bool) -> Tensor:
        """Increasing positions: dense ones, or with random gaps up to `LONGEST`."""
        if not gapped:
            return torch.arange(count).repeat(rows, 1)
        reach = int(self.rng.integers(count, max(LONGEST, count) + 1))
        places = [np.sort(self.rng.choice(reach, count, replace=False)) for _ in range(rows)]
        return torch.from_numpy(np.stack(places))

    def sample(self, question: Question) -> Sample:
        key = (question.text, question.answer)
        if key not in self.known:
            self.known[key] = encode(question, self.tokenizer)
        return self.known[key]


def _texts(thing: Thing) -> list[list[str]]:
    """The writing on an object: its letter and digit, or the letters of its word with their places."""
    if thing.word is not None:
        return [[letter, place] for letter, place in zip(thing.word, PLACES, strict=False)]
    return [[text] for text in (thing.letter, thing.digit) if text is not None]


def _in_words(thing: Thing, cell: str) -> list[list[str]]:
    written = [words[0] for words in _texts(thing)]
    return [[word] for word in (thing.colour, thing.shape, *written, cell, ".")]


def bag_embeddings(ids: Tensor, embedding: nn.Embedding, noise: float) -> Tensor:
    """Bags (B, n, BAG) of ids, -1 for none -> sums of their embeddings (B, n, D), with noise on top."""
    vectors = embedding(ids.clamp(min=0)) * (ids >= 0)[..., None]  # (B, n, BAG, D)
    size = embedding.weight.detach().std()
    return vectors.sum(2) + noise * size * torch.randn_like(vectors[:, :, 0])


def read(
    model: LlamaForCausalLM, source: Descriptions, size: int, progress: float = 1.0
) -> tuple[Tensor, Tensor, Packed, list[list[Question]]]:
    """One batch through the LLM: loss, logits, what was packed, and the questions."""
    ids, positions, scenes, questions = source.batch(size, progress)
    samples = [[source.sample(question) for question in row] for row in questions]
    if model.training:
        for row, scene in zip(samples, scenes, strict=True):
            row += [encode(said, source.tokenizer) for said in caption(scene, source.rng)]
    packed = pack(samples, ids.shape[1], 0, model.config.pad_token_id, positions).to(model.device)
    embedding = model.get_input_embeddings()
    described = bag_embeddings(ids.to(model.device), embedding, NOISE)
    output = model(
        inputs_embeds=torch.cat([described, embedding(packed.input_ids[:, ids.shape[1] :])], dim=1),
        attention_mask=packed.attention_mask,
        position_ids=packed.position_ids,
        labels=packed.labels,
        use_cache=False,
    )
    return output.loss, output.logits, packed, questions


def train_reader(
    scale: Scale,
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    report: Callable[[int, float], None] = lambda step, loss: None,
    device: torch.device = CPU,
) -> LlamaForCausalLM:
    """Pre-trains the LLM; `report` gets step and loss after each step."""
    torch.manual_seed(seed)
    schedule = scale.reader
    model = LlamaForCausalLM(scale.text_config(len(tokenizer))).to(device)
    source = Descriptions(tokenizer, scale.levels, seed)
    optimise = optimiser([(model, schedule.lr)])
    rates = warm_cosine(optimise, schedule.steps)
    for step in range(1, schedule.steps + 1):
        loss, *_ = read(model, source, schedule.batch, (step - 1) / schedule.steps)
        optimise.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimise.step()
        rates.step()
        report(step, loss.item())
    return model.eval()


@torch.no_grad()
def comprehension(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, levels: Sequence[str], batches: int = 20
) -> dict[str, float]:
    """Exact match per kind of question, on new descriptions."""
    source = Descriptions(tokenizer, levels, seed=1_000_003)
    hits: dict[str, list[bool]] = {}
    for _ in range(batches):
        _, logits, packed, questions = read(model, source, 32)
        for row, right in zip(questions, all_right(logits, packed), strict=True):
            for question, hit in zip(row, right, strict=True):
                hits.setdefault(question.kind, []).append(hit)
    return {kind: float(np.mean(found)) for kind, found in hits.items()}
