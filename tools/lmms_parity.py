"""Runs lmms-eval on a tiny model of every method, and compares its answers with those of `ask`.

    python tools/lmms_parity.py benchmarks/lmms_eval.md

Needs lmms-eval (docs/clients.md says how it is installed) and no network: it makes questions and pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import foveate
from foveate.clients.lmms import Request, Settings, answer
from foveate.methods import method_names
from foveate.tiny import tiny_model

SIZES = ((60, 100), (200, 90), (33, 33), (448, 57), (120, 120), (97, 301), (56, 56), (300, 240))
TOKENS, BATCH = 8, 3
POST = "\nAnswer the question using a single word or phrase."  # of the task mme
LOCAL = """
task: local_pictures
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
MME = """
include: {tasks}/mme/mme.yaml
task: local_mme
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {folder}/mme.parquet}}}}
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}}
"""
UTILS = """
from PIL import Image

def visual(document):
    return [Image.open(picture) for picture in document["pictures"]]
"""


def write_tasks(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Writes pictures, questions and both tasks; returns the documents of each task."""
    import datasets
    from lmms_eval import tasks

    rng = np.random.default_rng(0)
    pictures = [str(folder / f"{i}.png") for i in range(len(SIZES))]
    for path, (height, width) in zip(pictures, SIZES, strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    local = [
        {"pictures": [path], "question": f"What is in picture {i}?", "answer": "noise"}
        for i, path in enumerate(pictures)
    ]
    local += [
        {"pictures": pictures[i : i + 2], "question": "Which of the two is larger?", "answer": "neither"}
        for i in range(2)
    ]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in local))
    mme = [
        {
            "question_id": f"existence/{i}.png",
            "image": path,
            "question": f"Is there {what} in the picture? Please answer yes or no.",
            "answer": reply,
            "category": "existence",
        }
        for i, path in enumerate(pictures[:4])
        for what, reply in (("noise", "Yes"), ("a cat", "No"))
    ]
    table = datasets.Dataset.from_list(mme).cast_column("image", datasets.Image())
    table.to_parquet(str(folder / "mme.parquet"))
    (folder / "tasks").mkdir()
    values = {"folder": folder, "tokens": TOKENS, "tasks": Path(str(tasks.__file__)).parent}
    (folder / "tasks" / "local_pictures.yaml").write_text(LOCAL.format(**values))
    (folder / "tasks" / "local_mme.yaml").write_text(MME.format(**values))
    (folder / "tasks" / "utils.py").write_text(UTILS)
    return local, mme


def evaluate(folder: Path, method: str, processes: int) -> tuple[dict[str, list[dict[str, Any]]], float]:
    """Runs lmms-eval as users do; returns the samples of each task in order, and the score of MME."""
    out = folder / f"{method}-{processes}"
    launch = (
        [] if processes == 1 else ["accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    )
    launch += ["-m"] if launch else []
    command = [
        *(sys.executable, "-m", *launch, "lmms_eval", "eval", "--model", "foveate"),
        *("--model_args", f"pretrained={folder / method},device=cpu,dtype=float32"),
        *("--tasks", "local_pictures,local_mme", "--include_path", str(folder / "tasks")),
        *("--batch_size", str(BATCH), "--log_samples", "--output_path", str(out)),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    samples = {}
    for task in ("local_pictures", "local_mme"):
        (path,) = out.rglob(f"*_samples_{task}.jsonl")
        lines = path.read_text(encoding="utf-8").splitlines()
        samples[task] = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    (path,) = out.rglob("*_results.json")
    scores = json.loads(path.read_text(encoding="utf-8"))["results"]["local_mme"]
    return samples, scores["mme_perception_score,none"]


def expected(model: foveate.Foveate, pictures: list[str], question: str) -> tuple[str, int, int]:
    """The answer of `ask`, and how many tokens were read and written; of several pictures, in one message."""
    if len(pictures) == 1:
        said = model.ask(pictures[0], question, max_new_tokens=TOKENS)
        return said.text, said.ledger.prompt_tokens + said.ledger.kept_tokens, said.ledger.new_tokens
    parts = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": question}]
    settings = Settings.of({"max_new_tokens": TOKENS}, "local_pictures", TOKENS)
    (reply,) = answer(model, [Request(lambda: [{"role": "user", "content": parts}], settings, "several")])
    return reply.text, reply.ledger.prompt_tokens, reply.ledger.new_tokens


def said(sample: dict[str, Any]) -> tuple[str, int, int]:
    (counts,) = sample["token_counts"]
    reply = sample["filtered_resps"]
    return reply if isinstance(reply, str) else reply[0], counts["input_tokens"], counts["output_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path, help="the page that is written")
    parser.add_argument("--methods", nargs="+", default=method_names(), help="by default all")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        local, mme = write_tasks(folder)
        asked = {
            "local_pictures": [(row["pictures"], row["question"]) for row in local],
            "local_mme": [
                ([row["image"]], row["question"].replace(" Please answer yes or no.", "") + POST)
                for row in mme
            ],
        }
        for method in given.methods:
            tiny_model(method).save(folder / method)
            model = foveate.load(folder / method, device="cpu", dtype="float32")
            wanted = {task: [expected(model, *one) for one in questions] for task, questions in asked.items()}
            for processes in (1, 2) if method == given.methods[0] else (1,):
                samples, score = evaluate(folder, method, processes)
                equal = {
                    task: sum(said(s) == w for s, w in zip(samples[task], wanted[task], strict=True))
                    for task in wanted
                }
                counts = " | ".join(f"{equal[task]} of {len(wanted[task])}" for task in wanted)
                rows.append(f"| {method} | {processes} | {counts} | {score:g} |")
    versions = ", ".join(
        f"{package} {version(package)}" for package in ("lmms_eval", "transformers", "torch")
    )
    given.report.write_text(PAGE.format(versions=versions, rows="\n".join(rows), batch=BATCH, tokens=TOKENS))


PAGE = """# lmms-eval against `ask`

Written by `python tools/lmms_parity.py benchmarks/lmms_eval.md` with {versions}.

Each method's tiny model, whose weights are random, answers questions through
`python -m lmms_eval eval --model foveate`, in batches of {batch}, up to {tokens} tokens each, greedily,
float32 on the CPU. The columns count answers that equal those of `ask` in their text, in the number of
tokens read and in the number written. A local task has ten questions about pictures of mixed sizes, two of
them about two pictures. The other task has lmms-eval's own prompt and scoring of MME, on eight questions made
here; its score is the last column. Random weights never say yes or no.

| method | processes | local pictures | MME | MME score |
|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    main()
