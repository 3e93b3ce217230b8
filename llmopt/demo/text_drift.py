"""How far the running interpreter's built-in text is from what the demo model was trained with.

The documents come from the interpreter, so another Python version has other ones. Nothing breaks;
the numbers in the model card hold for the recorded version only, and a report says so.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from llmopt.calibration.builtin_text import SPLITS, builtin_documents, text_fingerprint
from llmopt.demo.paths import text_hashes_path

HASH_CHARS = 16


@dataclass(frozen=True, slots=True)
class TextDrift:
    """Documents of one split, the recorded ones against the running interpreter's.

    Attributes:
        recorded_python: the version that the demo model was trained with.
        num_same: same name, same text.
        num_changed: same name, other text.
        num_missing: recorded, not here.
        num_new: here, not recorded.
    """

    split: str
    recorded_python: str
    num_same: int
    num_changed: int
    num_missing: int
    num_new: int


def text_drift(path: Path | None = None) -> list[TextDrift]:
    """Return one TextDrift per split against the hashes at ``path`` (the committed ones)."""
    recorded = json.loads((path or text_hashes_path()).read_text(encoding="utf-8"))
    drifts = []
    for split in SPLITS:
        old: dict[str, str] = recorded["documents"][split]
        new = {d.name: d.sha256[:HASH_CHARS] for d in builtin_documents(split)}
        common = old.keys() & new.keys()
        num_same = sum(old[name] == new[name] for name in common)
        drifts.append(
            TextDrift(
                split=split,
                recorded_python=recorded["fingerprint"]["python"],
                num_same=num_same,
                num_changed=len(common) - num_same,
                num_missing=len(old.keys() - new.keys()),
                num_new=len(new.keys() - old.keys()),
            )
        )
    return drifts


def write_text_hashes(path: Path) -> None:
    """Write the running interpreter's hashes: per split, and 64 bits of each document's."""
    documents = {
        split: {d.name: d.sha256[:HASH_CHARS] for d in builtin_documents(split)} for split in SPLITS
    }
    record = {"version": 1, "fingerprint": text_fingerprint(), "documents": documents}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
