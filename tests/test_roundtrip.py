"""The round trip refuses an artifact in which anything is not what was calibrated or copied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmopt.checkpoint.scan import tensor_digest
from llmopt.errors import RoundTripError
from llmopt.formats.compressed_tensors import CompressedTensors
from llmopt.progress import silent
from llmopt.quantization.rtn import rtn
from llmopt.quantization.scheme import Scheme
from llmopt.roundtrip import check_round_trip

SCHEME = Scheme(4, 32)
WEIGHT = rtn(
    torch.randn(16, 64, generator=torch.Generator().manual_seed(0)),
    SCHEME,
    scale_dtype=torch.bfloat16,
)
NORM = torch.linspace(-1, 1, 16)


def write(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**CompressedTensors().pack("m", WEIGHT), "norm.weight": NORM.clone(), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "quantization_config": CompressedTensors().config({"m": SCHEME}, []),
    }
    (folder / "config.json").write_text(json.dumps(config))


def check(folder: Path) -> int:
    solved, copied = {"m": WEIGHT.digest()}, {"norm.weight": tensor_digest(NORM)}
    return check_round_trip(folder, solved, {"m": SCHEME}, copied, silent).num_tensors


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path)
    assert check(tmp_path) == 2


def changed_code() -> torch.Tensor:
    packed = CompressedTensors().pack("m", WEIGHT)["m.weight_packed"].clone()
    packed[3, 2] ^= 1 << 9
    return packed


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"m.weight_packed": changed_code()}, "m"),
        ({"norm.weight": NORM + 2**-20}, "norm.weight"),
        ({"norm.weight": NORM.to(torch.bfloat16)}, "norm.weight"),
        ({"norm.weight": None, "other.weight": NORM}, "norm.weight"),
        ({"n.weight_packed": torch.zeros(1, 1, dtype=torch.int32)}, "n"),
    ],
)
def test_what_differs_is_named(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], named: str
) -> None:
    write(tmp_path, **changes)
    with pytest.raises(RoundTripError, match=f"1 tensors .*: {named}$|: {named}\n"):
        check(tmp_path)
