"""The same over a cluster: Ray on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from foveate import FoveateError
from foveate.batch.cluster import over_cluster
from tests.command import foveate
from tests.support import picture
from tests.upstream import upstream

ray = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_as_without_a_cluster(tmp_path: Path) -> None:
    """In order, to the byte, and going on where a run without one was killed."""
    rows = []
    for i in range(20):
        picture(20, 30 + i).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "question": f"No. {i}?"}))
    rows.insert(7, "no JSON")
    data, out, alone = (tmp_path / name for name in ("data.jsonl", "out.jsonl", "alone.jsonl"))
    data.write_text("\n".join(rows))
    with upstream() as server:
        rest = ("--upstream", server.url, "--name", "m", "--batch", "3")
        assert foveate("batch", data, alone, *rest).code == 0
        found = foveate("batch", data, out, *rest, "--ray", "--actors", "2")
        assert found.code == 0, found.stderr
        assert out.read_bytes() == alone.read_bytes()
        out.write_bytes(b"".join(alone.read_bytes().splitlines(keepends=True)[:9]) + b"{")
        before = len(server.requests)
        assert foveate("batch", data, out, *rest, "--ray").code == 0
        assert out.read_bytes() == alone.read_bytes() and len(server.requests) - before == 12
        assert foveate("batch", data, out, *rest, "--ray").code == 0  # nothing is left


def test_no_actors() -> None:
    with pytest.raises(FoveateError, match="actors must be at least 1"):
        over_cluster(lambda: None, 1, actors=0)  # type: ignore[arg-type,return-value]
