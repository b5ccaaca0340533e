"""Draws the pictures of README and docs: a street of 12 megapixels, what methods see of it, and answers.

    python docs/images/draw.py [FOLDER]

The scene is drawn here with PIL, so nobody else has rights in it. The model is tiny and random, but its views
have the 336 pixels of CLIP ViT-L/14-336; its answers are noise.
Demo and explanation are the embedded model's answers about examples/signs.jpg.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = (4000, 3000)
QUESTION = "Which line leaves at 14:25?"
SIGNS = Path(__file__).parents[2] / "examples" / "signs.jpg"
SIGNS_QUESTION = "what digit is on the red shape?"  # for the embedded model
WORD_QUESTION = "what word is on the sign?"
SEEDS = {"llava": 0, "anyres": 2, "slime": 5, "llava_hr": 16, "inf_llava": 3, "coroi": 4}  # printable noise
OPTIONS = {"llava_hr": {"groups": 3, "convnext": {"depths": [1, 1, 1, 1], "widths": [8, 16, 32, 64]}}}
WALLS = ("#c8745a", "#e3c08a", "#8fa7a0", "#d9d3c3", "#b98b6b")
SHOPS = (
    ("BAKERY", "#5b3a29", "Rye bread  3.20", "Croissant  1.40", "Closed on Mondays"),
    ("BOOKS", "#1f3b57", "Second hand", "Maps from 1890", "Bell at the side door"),
    ("OPTICIAN", "#26544a", "E F P", "T O Z", "Eye test: 20 minutes"),
    ("FLORIST", "#7a2f4a", "Tulips  6.00", "Peonies  9.50", "Please do not touch"),
    ("CLOCKS", "#4a4458", "Repairs", "Winding keys", "Back at half past two"),
)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def street() -> Image.Image:
    """Five houses with shops, a tram stop with a timetable, a tram: most of the text is a few pixels high."""
    rng = random.Random(7)
    image = Image.new("RGB", SIZE, "#bcd7e6")
    draw = ImageDraw.Draw(image)
    draw.ellipse((3150, 180, 3450, 480), fill="#f7e6a6")
    for x, y, width in ((300, 260, 620), (1500, 140, 480), (2350, 380, 540)):
        for step in range(4):
            left = x + step * width // 5
            draw.ellipse((left, y - 40 * (step % 2), left + width // 3, y + 110), fill="#e8f1f5")
    draw.rectangle((0, 2380, 4000, 3000), fill="#8b8d90")
    draw.rectangle((0, 2380, 4000, 2500), fill="#bdb8ae")
    for i, wall in enumerate(WALLS):
        house(draw, rng, 800 * i, 700 + 140 * (i * 3 % 5), wall, SHOPS[i], 12 + 2 * i)
    for y in (2640, 2700, 2880, 2940):
        draw.rectangle((0, y, 4000, y + 10), fill="#6d6f73")
    tram(draw, 1800, 2150)
    stop(draw, 880, 1850)
    return image.quantize(96, dither=Image.Dither.NONE)


def house(
    draw: ImageDraw.ImageDraw,
    rng: random.Random,
    left: int,
    top: int,
    wall: str,
    shop: tuple[str, ...],
    number: int,
) -> None:
    draw.rectangle((left, top, left + 799, 2380), fill=wall)
    draw.polygon([(left - 10, top), (left + 400, top - 230), (left + 810, top)], fill="#6b4a42")
    rows = (1740 - top) // 300
    for row in range(rows):
        for column in range(3):
            x, y = left + 90 + 235 * column, top + 80 + 300 * row
            draw.rectangle((x - 12, y - 12, x + 162, y + 212), fill="#f2eee4")
            draw.rectangle((x, y, x + 150, y + 200), fill=rng.choice(("#50677a", "#3f5566", "#e9d58f")))
            draw.line((x + 75, y, x + 75, y + 200), fill="#f2eee4", width=8)
            draw.line((x, y + 80, x + 150, y + 80), fill="#f2eee4", width=8)
    name, colour, *notes = shop
    draw.rectangle((left + 40, 1760, left + 760, 1880), fill=colour)
    draw.text((left + 400, 1820), name, "#f6f0e0", font=font(84), anchor="mm")
    draw.rectangle((left + 60, 1910, left + 500, 2300), fill="#dfe9ec", outline=colour, width=14)
    for i, note in enumerate(notes):
        y = 1990 + 100 * i
        draw.rectangle((left + 110, y - 34, left + 450, y + 34), fill="#fffdf6")
        draw.text((left + 280, y), note, "#2b2b2b", font=font(30), anchor="mm")
    draw.rectangle((left + 550, 1910, left + 740, 2380), fill=colour)
    draw.rectangle((left + 580, 1950, left + 710, 2150), fill="#dfe9ec")
    draw.rectangle((left + 612, 2190, left + 678, 2236), fill="#fffdf6")
    draw.text((left + 645, 2213), str(number), "#2b2b2b", font=font(34), anchor="mm")


def tram(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    draw.rounded_rectangle((left, top, left + 1900, top + 620), 70, fill="#c9302c")
    draw.rectangle((left, top + 330, left + 1900, top + 380), fill="#f4efe6")
    for i in range(6):
        x = left + 60 + 300 * i
        draw.rounded_rectangle((x, top + 90, x + 260, top + 300), 20, fill="#2f4350")
    draw.rectangle((left + 90, top + 20, left + 760, top + 78), fill="#1b1b1b")
    draw.text((left + 425, top + 49), "7  Observatory", "#ffc247", font=font(48), anchor="mm")
    draw.text((left + 1780, top + 560), "tram 2047", "#f4efe6", font=font(22), anchor="mm")
    draw.text((left + 990, top + 480), "Look closer.", "#f4efe6", font=font(110), anchor="mm")
    for x in (left + 320, left + 560, left + 1350, left + 1590):
        draw.ellipse((x - 70, top + 560, x + 70, top + 700), fill="#2b2b2b")
        draw.ellipse((x - 28, top + 602, x + 28, top + 658), fill="#8b8d90")


def stop(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    draw.rectangle((left, top, left + 24, top + 760), fill="#33383d")
    draw.ellipse((left - 88, top - 190, left + 112, top + 10), fill="#1f5fa8", outline="#f4efe6", width=14)
    draw.text((left + 12, top - 90), "T", "#f4efe6", font=font(130), anchor="mm")
    draw.rectangle((left - 100, top + 120, left + 124, top + 430), fill="#fffdf6", outline="#33383d", width=8)
    draw.text((left + 12, top + 150), "Market Square", "#1f5fa8", font=font(26), anchor="mm")
    times = ("14:05   3", "14:11   7", "14:18   3", "14:25   9", "14:32   7", "14:44   3")
    for i, time in enumerate(times):
        draw.text((left - 70, top + 190 + 36 * i), time, "#2b2b2b", font=font(22), anchor="lm")


def random_model(method: str, seed: int, folder: Path) -> None:
    """A model whose views have 336 pixels, 24 x 24 tokens each, and whose LLM is tiny and random."""
    from transformers import set_seed

    from foveate import compose
    from foveate.tiny import tiny_text, tiny_tokenizer, tiny_vision

    set_seed(seed)
    vision, text = tiny_vision(image_size=336), tiny_text(max_position_embeddings=4096)
    compose(vision, text, method, OPTIONS.get(method), tokenizer=tiny_tokenizer()).save(folder)


def main(folder: Path) -> None:
    from tempfile import TemporaryDirectory

    from foveate.cli import app

    scene = folder / "street.png"
    street().save(scene, optimize=True)
    for method, seed in SEEDS.items():
        with TemporaryDirectory() as model:
            random_model(method, seed, Path(model) / "model")
            seen = folder / f"{method}.png"
            arguments = ["ask", str(scene), QUESTION, "--model", f"{model}/model", "--out", str(seen)]
            app([*arguments, "--max-new-tokens", "4"], standalone_mode=False)
            shrink(seen)
    seen = folder / "demo.png"
    app(["ask", str(SIGNS), SIGNS_QUESTION, "--out", str(seen)], standalone_mode=False)
    shrink(seen)
    seen = folder / "explained.png"
    app(
        ["explain", str(SIGNS), WORD_QUESTION, "--dtype", "float32", "--out", str(seen)],
        standalone_mode=False,
    )
    shrink(seen)


def shrink(path: Path) -> None:
    with Image.open(path) as drawing:
        small = drawing.quantize(128, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
