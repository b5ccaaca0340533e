"""The material of pictures: real photographs, real handwritten digits, fonts and words.

All of it comes with installed packages: two photographs (china.jpg and flower.jpg, CC BY 2.0) and 1,797
digits with scikit-learn, the DejaVu fonts with matplotlib. Training and test share nothing: the photographs
are cut in two, digits and words are divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from foveate.errors import require

Split: TypeAlias = Literal["tower", "train", "test"]
SPLITS: tuple[Split, ...] = ("tower", "train", "test")  # tower and train differ in scenes, not in materials

PHOTOGRAPHS = ("china.jpg", "flower.jpg")
TRAIN_COLUMNS = 420  # of 640 pixels; the strip between the two parts is not used
TEST_COLUMNS = 440
TRAIN_DIGITS = 1400

LETTERS = "ACEHKLNOPRSTUX"
DIGITS = "0123456789"
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
# None of them starts with a word of the questions, such as `top`: the tokenizer spells them all.
WORD_LIST = """
    ACE ACT ANT APE ARC ART ASH ATE CAN CAP CAR CAT COT CUE CUP CUT EAR EAT ERA HAT HEN HER HOP HOT HUT
    ION LAP LET LOT NET NOR NOT NUT OAK OAR OUR OUT OWN PAL PAN PAR PAT PEA PEN PET POT RAN RAT RUN RUT
    SAT SEA SET SON SUN TAN TAP TAR TEA TEN TOE TON USE
    ACHE ACRE AUNT CAKE CANE CAPE CARE CASE CASH CAST CENT CHAT CHEF COAL COAT COKE CONE COPE CORE CORK CORN
    COST CUTE EARN EAST ECHO HALO HARE HARP HEAL HEAP HEAR HEAT HERO HOLE HOPE HORN HOSE HOST HUNT KALE
    KELP LACE LAKE LANE LAST LATE LEAK LEAN LENS LOAN LOCK LOOP LUCK NECK NEON NEST NOON NOSE NOTE OATH
    OPAL OPEN PACE PACK PARK PART PAST PATH PEAK PEAR PEST POEM POET POLE POND PORK PORT POST PURE RACE RACK
    RAKE RANK RATE REEL REST ROCK ROLE ROOT ROPE ROSE SALE SALT SAND SEAL SEAT SHOE SHOP SLOT SOAP SOCK
    SOLE SOUP SPOT STAR STEP STOP SURE TALE TALK TANK TEAK TENT TEXT TONE TOOL TREE TUNA TUNE
    APRON CANOE CHAIR CHALK CHART CHASE CHEAP CHEST CLEAN CLOCK CLOTH CLOUT COAST CORAL COUNT COURT CRANE
    CREEK EARTH EXTRA HEART HORSE HOTEL HOUSE KOALA LEASH LUNCH NORTH NURSE OCEAN OTHER PAPER PASTE
    PEACH PHONE PLANE PLANT PLATE POLAR PORCH RANCH REACH ROAST ROUTE SAUCE SCALE SHARK SHEEP SHELL SHORE
    SKATE SLATE SLOPE SNAKE SNORE SOLAR SOUTH SPACE SPARK SPOKE SPOON STALK STATE STEAK STONE STORE STORK
    TEACH THREE TOAST TOTAL TOUCH TRACK TRAP TRUCK TRUNK
"""
WORDS = tuple(word for word in WORD_LIST.split() if set(word) <= set(LETTERS))
WORD_LENGTHS = (3, 5)
INVENTED = 0.6  # fraction of training words that are random letters, so that they must be spelled
TOKENS = ("ARE", "CROSS", "HAS", "NONE", "ON", "SHAPE", "THE", "TOP")  # no invented word starts with them


@dataclass(frozen=True)
class Materials:
    """The material of one split.

    Attributes:
        photographs: (H, W, 3) bytes, the split's part of each.
        digits: per digit 0 to 9 (n, 8, 8) bytes, bright ink.
        words: capitals.
        invented: fraction of random letters among the words that `word` returns.
    """

    photographs: tuple[np.ndarray, ...]
    digits: tuple[np.ndarray, ...]
    words: tuple[str, ...]
    invented: float = 0.0

    def word(self, rng: np.random.Generator) -> str:
        """One of `words`, or random letters that are not a word of any split."""
        if self.invented == 0 or rng.random() >= self.invented:
            return str(rng.choice(self.words))
        while True:
            length = int(rng.integers(WORD_LENGTHS[0], WORD_LENGTHS[1] + 1))
            word = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=length))
            if word not in WORDS and not word.startswith(TOKENS):
                return word


@lru_cache(maxsize=len(SPLITS))
def materials(split: Split) -> Materials:
    """Raises `FoveateError` if scikit-learn or matplotlib is not installed."""
    check_packages()
    from sklearn.datasets import load_digits, load_sample_image

    test = split == "test"
    columns = slice(TEST_COLUMNS, None) if test else slice(0, TRAIN_COLUMNS)
    rows = slice(TRAIN_DIGITS, None) if test else slice(0, TRAIN_DIGITS)
    photographs = tuple(np.ascontiguousarray(load_sample_image(name)[:, columns]) for name in PHOTOGRAPHS)
    known = load_digits()
    images = (known.images[rows] / 16 * 255).astype(np.uint8)
    digits = tuple(images[known.target[rows] == n] for n in range(10))
    words = tuple(word for i, word in enumerate(WORDS) if (i % 4 == 3) == test)
    return Materials(photographs, digits, words, 0.0 if test else INVENTED)


@lru_cache(maxsize=256)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A DejaVu font at `size` pixels."""
    check_packages()
    package = find_spec("matplotlib")
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)


@lru_cache(maxsize=4096)
def letter_mask(letter: str, font_name: str, size: int) -> Image.Image:
    """The letter's ink, grey, cropped to its own box."""
    face = font(font_name, size)
    left, top, right, bottom = (int(n) for n in face.getbbox(letter))
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), letter, fill=255, font=face)
    return mask


def check_packages() -> None:
    """Raises `FoveateError` if scikit-learn or matplotlib is not installed."""
    for package in ("sklearn", "matplotlib"):
        require(package, "lab", "the lab")
