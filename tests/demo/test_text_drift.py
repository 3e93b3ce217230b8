"""Counting how far the running interpreter's documents are from a record."""

from pathlib import Path

import pytest

from llmopt.calibration.documents import Document
from llmopt.demo import text_drift as drift_module
from llmopt.demo.text_drift import text_drift, write_text_hashes


def test_drift_counts_same_changed_missing_and_new(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "hashes.json"
    recorded = [Document("same", "a"), Document("changed", "b"), Document("missing", "c")]
    monkeypatch.setattr(drift_module, "text_fingerprint", lambda: {"python": "3.0.0"})
    monkeypatch.setattr(drift_module, "builtin_documents", lambda split: recorded)
    write_text_hashes(path)
    running = [
        Document("same", "a"),
        Document("changed", "x"),
        Document("new1", ""),
        Document("new2", ""),
    ]
    monkeypatch.setattr(drift_module, "builtin_documents", lambda split: running)
    for drift in text_drift(path):
        assert drift.recorded_python == "3.0.0"
        assert (drift.num_same, drift.num_changed) == (1, 1)
        assert (drift.num_missing, drift.num_new) == (1, 2)
