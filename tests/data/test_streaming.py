"""JSON record by record: what json.loads finds, wherever the blocks end, in the memory of a record."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate import FoveateError
from foveate.data import streaming
from foveate.data.streaming import keyed, listed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(VALUES, max_size=5), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_a_list_is_read_wherever_blocks_end(
    tmp_path: Path, records: list[Any], block: int, indent: int | None, ascii: bool
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=ascii), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BLOCK", block)
        found = list(listed(path))
    assert [item.value for item in found] == records
    raw = path.read_bytes()
    assert [json.loads(raw[item.start : item.end]) for item in found] == records


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), st.integers(1, 40), st.booleans())
def test_an_object_is_read_wherever_blocks_end(
    tmp_path: Path, records: dict[str, Any], block: int, ascii: bool
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records, ensure_ascii=ascii), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BLOCK", block)
        assert {item.key: item.value for item in keyed(path)} == records


def test_keys_given_twice_are_both_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"1": {"a": 1}, "1": {"a": 2}}')
    assert [(item.key, item.value["a"]) for item in keyed(path)] == [("1", 1), ("1", 2)]


@pytest.mark.parametrize("block", [4, 2**20])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'[{"a": 1},\n {"a" 2}]', "line 2 is not valid JSON: Expecting ':' delimiter"),
        (b'[{"a": 1}\n {"a": 2}]', "line 2 is not valid JSON: expected a comma or the list's end"),
        (b'[{"a": 1},\n {"a": "x', "line 2 is not valid JSON: Unterminated string"),
        (b'[{"a": 1},', "line 1 is not valid JSON: Expecting value"),
        (b'[{"a": 1},]', "line 1 is not valid JSON: Expecting value"),
        (b'[{"a": 1}] 3', "there is more after the list's end"),
        (b'[{"a": 1}, {"a": "\xe9"}]', "sample 1 is not UTF-8 at byte 7"),
        (b"{}", "should hold a JSON list of records"),
        (b"", "should hold a JSON list of records"),
    ],
)
def test_broken_lists_are_named_with_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, message: str, block: int
) -> None:
    monkeypatch.setattr(streaming, "BLOCK", block)
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(FoveateError, match=message) as error:
        list(listed(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, 2: 3}', "expected a key in double quotes"),
        (b'{"a" 1}', "expected a colon behind the key"),
        (b'{"a": 1 "b": 2}', "expected a comma or the object's end"),
        (b'{"a": "\xe9"}', "record 'a' is not UTF-8 at byte 1"),
        (b"[]", "should hold a JSON object"),
    ],
)
def test_broken_objects_are_named_with_their_place(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(FoveateError, match=message):
        list(keyed(path))


def test_a_large_file_takes_the_memory_of_its_blocks(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    record = json.dumps({"id": "x", "text": "y" * 1000})
    with path.open("w") as file:
        file.write("[" + record)
        for _ in range(40_000):
            file.write("," + record)
        file.write("]")
    assert path.stat().st_size > 40_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in listed(path)) == 40_001
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    finally:
        tracemalloc.stop()


def test_a_record_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LONGEST", 2**10)
    monkeypatch.setattr(streaming, "BLOCK", 2**8)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["x" * 5000]))
    with pytest.raises(FoveateError, match="sample 0 is longer than 1024 bytes"):
        list(listed(path))
