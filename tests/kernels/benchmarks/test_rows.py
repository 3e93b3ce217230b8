"""The report: JSON there and back, and the table."""

import json

import pytest
from support.kernels_benchmarks import CEILINGS, ENVIRONMENT, row

from benchmarks.goals import GoalResult
from benchmarks.rows import Report, file_name, from_json, table, to_json

REPORT = Report(
    ENVIRONMENT,
    CEILINGS,
    (row(), row(implementation="SDPA cuDNN", status="unavailable", reason="no cuDNN", rate=None)),
    (GoalResult("fast", 1.0, 1.25, "met"), GoalResult("small", 0.5, None, "unmeasured", "no row")),
    12.5,
    ("a note",),
)


def test_json_there_and_back():
    assert from_json(to_json(REPORT)) == REPORT


def test_every_row_says_where_it_comes_from():
    data = json.loads(to_json(REPORT))
    assert data["schema_version"] == 1
    for found in data["rows"]:
        assert found["unit"] and found["environment"]["commit"] == "abc"
        assert found["environment"]["device"] == "NVIDIA H200"


def test_an_empty_report_is_json_too():
    empty = Report(ENVIRONMENT, None, (), (), 0.0)
    assert from_json(to_json(empty)) == empty
    assert "ceilings: not measured" in table(empty)


def test_another_schema_is_refused():
    other = to_json(REPORT).replace('"schema_version": 1', '"schema_version": 7')
    with pytest.raises(ValueError, match="schema version 7; this reads 1"):
        from_json(other)


def test_the_table_has_every_row_with_times_or_reason():
    text = table(REPORT)
    assert "3600 GB/s" in text and "90.0%" in text and "1.0000" in text
    assert "unavailable: no cuDNN" in text
    assert "fp8 RuntimeError: no fp8 here" in text
    assert "1.250" in text and "unmeasured no row" in text
    assert "2 rows: 1 measured, 0 failed, 1 unavailable, 0 left out" in text


def test_the_file_is_named_after_the_device():
    assert file_name("NVIDIA H200") == "nvidia-h200.json"
    assert file_name("NVIDIA RTX 6000 (Ada)") == "nvidia-rtx-6000-ada.json"
