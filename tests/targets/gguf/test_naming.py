"""What a file calls its model."""

from pathlib import Path

import pytest

from llmopt.targets.gguf.naming import model_name

CACHE = "hub/models--microsoft--Phi-3-mini-4k-instruct/snapshots/0a67737"


@pytest.mark.parametrize(
    ("folder", "origin", "name"),
    [
        ("models/mine", None, "mine"),
        ("models/mine", "", "mine"),
        ("models/mine", 7, "mine"),
        ("models/mine", "meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        ("models/mine", "/data/checkpoints/base/", "base"),
        ("models/mine", "C:\\models\\base", "base"),
        ("models/mine", f"/home/{CACHE}", "Phi-3-mini-4k-instruct"),
        (CACHE, None, "Phi-3-mini-4k-instruct"),
        (CACHE, "another/base", "Phi-3-mini-4k-instruct"),
        ("models/snapshots/0a67737", None, "0a67737"),
    ],
)
def test_a_model_is_called_by_its_own_name(
    tmp_path: Path, folder: str, origin: object, name: str
) -> None:
    config = {} if origin is None else {"_name_or_path": origin}
    assert model_name(tmp_path / folder, config) == name
