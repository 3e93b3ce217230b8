"""`llmopt inspect` and `llmopt recipes` on what llmopt did not write itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import llama_config, rewrite_config, rewrite_tensors, write_checkpoint
from typer.testing import CliRunner

from llmopt.cli import app
from llmopt.inspection import inspect_path
from llmopt.recipe import recipe_files

FOREIGN: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 5, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                "input_activations": {"num_bits": 8, "type": "float"},
            }
        },
    },
}


@pytest.mark.parametrize("method", FOREIGN)
def test_what_another_tool_quantized_is_shown_without_schemes(method: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_config())
    qweight = torch.zeros(4, 32, dtype=torch.int32)
    rewrite_tensors(tmp_path, lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": qweight}))
    rewrite_config(tmp_path, quantization_config=FOREIGN[method])
    seen = inspect_path(tmp_path)
    assert (seen.kind, seen.format, seen.schemes) == ("checkpoint", method, {})
    assert seen.unread is not None and method in seen.unread.lower()
    assert "model.layers.0.mlp.up_proj.qweight" in {tensor.name for tensor in seen.tensors}
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert shown.exit_code == 0 and method in shown.stdout and "not read" in shown.stdout


def test_an_unquantized_checkpoint_has_nothing_unread(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama_config())
    seen = inspect_path(tmp_path)
    assert (seen.format, seen.unread, seen.schemes) == (None, None, {})


def test_a_recipe_is_shown_by_name_and_by_path(tmp_path: Path) -> None:
    name, file = next(iter(recipe_files().items()))
    own = tmp_path / "own.yaml"
    own.write_text(f"# a remark of mine\n{file.read_text()}")
    by_name = CliRunner().invoke(app, ["recipes", name])
    by_path = CliRunner().invoke(app, ["recipes", str(own)])
    assert by_name.exit_code == by_path.exit_code == 0
    assert "stages:" in by_name.stdout and "stages:" in by_path.stdout
    assert "a remark of mine" in by_path.stdout
