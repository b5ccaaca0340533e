"""Models on a hub: what is uploaded, in one commit, and how it loads from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from foveate import FoveateError
from foveate.model.card import unchanged
from foveate.tiny import tiny_model
from tests.command import foveate as run_foveate
from tests.hub import TOKEN, Hub, serving

MODEL = {
    *("README.md", "chat_template.jinja", "config.json", "foveate_classes.py", "generation_config.json"),
    *("model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
}
# An interpreter that has never imported Foveate.
ELSEWHERE = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("me/mine", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("me/mine", trust_remote_code=True)
print(type(model).__name__, type(processor).__name__, model.config.made_from)
import foveate
print(foveate.load("me/mine", device="cpu"))
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving() as made:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.url)
        template = f"{made.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made


def test_a_model_is_pushed_whole_and_loads_elsewhere(hub: Hub, tmp_path: Path) -> None:
    address = tiny_model("anyres").push_to_hub("me/mine", private=True, tags=["tiny"])
    files = hub.files["me/mine"]["main"]
    assert set(files) == MODEL
    assert hub.commits == [("me/mine", "main", "Upload model")] and hub.private["me/mine"] == "private"
    assert address.startswith(f"{hub.url}/me/mine/commit/")
    text = files["README.md"].decode()
    assert unchanged(text)
    assert 'foveate.load("me/mine")' in text and "--model me/mine" in text and "- tiny\n" in text
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "FoveateForConditionalGeneration FoveateProcessor {'model': 'me/mine'}",
        "Foveate(AnyRes, cpu, bfloat16)" if "bfloat16" in done.stdout else "Foveate(AnyRes, cpu, float32)",
    ], done.stderr


def test_model_and_processor_alone_meet_in_one_repository(hub: Hub) -> None:
    made = tiny_model("llava")
    made.processor.push_to_hub("me/mine")
    assert set(hub.files["me/mine"]["main"]) == {
        *("chat_template.jinja", "foveate_classes.py", "processor_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    made.model.push_to_hub("me/mine", commit_message="Mine", revision="v2")
    assert set(hub.files["me/mine"]["v2"]) == MODEL
    assert [commit[1:] for commit in hub.commits] == [("main", "Upload processor"), ("v2", "Mine")]


def test_saving_with_push_to_hub(hub: Hub, tmp_path: Path) -> None:
    made, folder = tiny_model("llava"), tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("not to be pushed")
    made.model.save_pretrained(folder, push_to_hub=True, repo_id="me/mine", token=TOKEN)
    made.processor.save_pretrained(folder, push_to_hub=True)
    assert set(hub.files["me/mine"]["main"]) == MODEL


def test_somebody_s_card_in_a_repository_is_kept(hub: Hub) -> None:
    made = tiny_model("llava")
    made.push_to_hub("me/mine")
    made.push_to_hub("me/mine", tags=["again"])
    files = hub.files["me/mine"]["main"]
    assert b"- again\n" in files["README.md"]  # nobody had changed it
    mine = files["README.md"].replace(b"Not filled in yet", b"Apache-2.0")
    files["README.md"] = mine
    made.push_to_hub("me/mine")
    assert files["README.md"] == mine


def test_shards_of_earlier_weights_are_deleted(hub: Hub) -> None:
    made = tiny_model("llava")
    made.push_to_hub("me/mine", max_shard_size="200KB")
    files = hub.files["me/mine"]["main"]
    assert len([name for name in files if name.startswith("model-")]) > 1
    made.push_to_hub("me/mine")
    assert set(files) == MODEL


def test_what_the_hub_refuses_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_model("llava")
    with pytest.raises(FoveateError, match=r"did not take me/mine \(401\): log in with `hf auth login`"):
        made.push_to_hub("me/mine", token="hf_wrong")
    with pytest.raises(FoveateError, match="me/mine/deep is not the name of a repository"):
        made.push_to_hub("me/mine/deep")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FoveateError, match="me/mine cannot be pushed"):
        made.push_to_hub("me/mine")


def test_the_command(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model("llava").save(folder)
    for name in ("notes.md", "training_args.bin", ".secret"):
        (folder / name).write_text("stays here")
    (folder / "LICENSE").write_text("mine")
    before = (folder / "README.md").read_bytes()
    done = run_foveate("push", folder, "me/mine", "--private", "--message", "Mine")
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"pushed to {hub.url}/me/mine/commit/")
    files = hub.files["me/mine"]["main"]
    assert set(files) == {*MODEL, "LICENSE"} and hub.private["me/mine"] == "private"
    assert hub.commits == [("me/mine", "main", "Mine")]
    assert b"--model me/mine" in files["README.md"] and (folder / "README.md").read_bytes() == before
    values = json.loads((folder / "config.json").read_text())
    del values["auto_map"]
    (folder / "config.json").write_text(json.dumps(values))
    assert "has no auto_map" in run_foveate("push", folder, "me/mine").stderr
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in run_foveate("push", folder, "me/mine").stderr
    assert "has no config.json" in run_foveate("push", tmp_path, "me/mine").stderr
    assert "has no config.json" in run_foveate("push", tmp_path / "nothing", "me/mine").stderr
    assert len(hub.commits) == 1
