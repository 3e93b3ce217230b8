"""The built-in text: disjoint, free of near-duplicates, the same in every process, large enough."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmopt.calibration import builtin_text
from llmopt.calibration.builtin_text import (
    MIN_DOCUMENT_CHARS,
    SPLITS,
    builtin_documents,
    split_of,
    text_fingerprint,
)
from llmopt.calibration.near_duplicates import MAX_SEEN_SHARE, shingles
from llmopt.errors import BadInputError


def unit_of(name: str) -> str:
    return name.partition("#")[0]


def test_names_are_unique_and_units_stay_in_one_split() -> None:
    names = [d.name for split in SPLITS for d in builtin_documents(split)]
    assert len(names) == len(set(names))
    units = [{unit_of(d.name) for d in builtin_documents(split)} for split in SPLITS]
    assert sum(len(u) for u in units) == len(set().union(*units))
    for split in SPLITS:
        assert {split_of(unit_of(d.name)) for d in builtin_documents(split)} == {split}


def test_no_document_repeats_another_split() -> None:
    seen: set[str] = set()
    for split in SPLITS:
        found = {d.name: shingles(d.text) for d in builtin_documents(split)}
        repeated = {name: len(s & seen) / len(s) for name, s in found.items()}
        assert {name: share for name, share in repeated.items() if share > MAX_SEEN_SHARE} == {}
        seen.update(*found.values())


def test_sizes() -> None:
    num_chars = {split: sum(len(d.text) for d in builtin_documents(split)) for split in SPLITS}
    assert num_chars["evaluation"] > 300_000
    assert num_chars["calibration"] > 220_000
    assert num_chars["train"] > 1_000_000
    assert len(builtin_documents("evaluation")) >= 60
    assert len(builtin_documents("calibration")) >= 60
    assert all(
        len(d.text) >= MIN_DOCUMENT_CHARS or d.name.startswith("topic:")
        for split in SPLITS
        for d in builtin_documents(split)
    )


def test_text_is_normalised() -> None:
    for document in builtin_documents("calibration"):
        assert document.text == document.text.strip()
        assert "\n\n\n" not in document.text
        assert "\t" not in document.text
        assert not any(line.endswith(" ") for line in document.text.splitlines())


def test_same_text_in_every_process() -> None:
    """Python's own hash is randomised per process; nothing may depend on it."""
    program = (
        "from llmopt.calibration.builtin_text import builtin_documents, split_sha256;"
        "print(split_sha256(builtin_documents('evaluation')))"
    )
    root = Path(builtin_text.__file__).parents[2]
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == text_fingerprint()["evaluation"]


def test_what_some_distribution_lacks_is_never_measured() -> None:
    for name in ("tkinter", "idlelib.pyshell", "distutils.core", "_posix", "cgi"):
        assert split_of(f"module:{name}") == "train"


def test_c_twin_goes_with_its_module() -> None:
    for name in ("collections", "datetime", "decimal", "io", "json"):
        assert split_of(f"module:_{name}") == split_of(f"module:{name}")


def test_unknown_split_is_refused() -> None:
    with pytest.raises(BadInputError, match="evaluation, calibration, train"):
        builtin_documents("test")  # type: ignore[arg-type]


def test_python_without_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builtin_text, "stdlib_folder", lambda: tmp_path)
    monkeypatch.setattr(builtin_text, "topic_pieces", lambda wanted: iter(()))
    builtin_text._split_text.cache_clear()
    try:
        with pytest.raises(BadInputError, match="too little text"):
            builtin_documents("evaluation")
    finally:
        builtin_text._split_text.cache_clear()
