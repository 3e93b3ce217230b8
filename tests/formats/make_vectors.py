"""Write the conformance vectors beside this file: small weights with their bytes spelled out.

Run from the repository root: ``python tests/formats/make_vectors.py``.
"""

import json
from pathlib import Path

import torch

from llmopt.formats.compressed_tensors import CompressedTensors
from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.scheme import Scheme

VECTORS = Path(__file__).parent / "vectors"

CASES = {
    "w4_symmetric_group": Scheme(4, 4, True),
    "w4_asymmetric_group": Scheme(4, 4, False),
    "w4_asymmetric_channel": Scheme(4, None, False),
    "w8_symmetric_channel": Scheme(8, None, True),
    "w8_asymmetric_group": Scheme(8, 4, False),
    "w3_symmetric_channel": Scheme(3, None, True),
    "w3_asymmetric_channel": Scheme(3, None, False),
    "w2_symmetric_group": Scheme(2, 4, True),
    "w4_activation_order_group": Scheme(4, 4, True, "group"),
}


def make_tensor(scheme: Scheme) -> QuantizedTensor:
    """Codes that count up through the rows, so that every nibble of the bytes can be checked."""
    rows = 3 if scheme.symmetric else 9  # nine zero points of four bits take two words
    columns = 12 if scheme.group_size else 13
    groups = columns // scheme.columns_per_group(columns)
    codes = (torch.arange(rows * columns) % (scheme.max_code + 1)).view(rows, columns)
    scales = (2.0 ** (torch.arange(rows * groups) % 5 - 3)).view(rows, groups)
    zeros = (torch.arange(rows * groups) + 1).remainder(scheme.max_code + 1).view(rows, groups)
    grouped = scheme.activation_order == "group"
    return QuantizedTensor(
        codes=codes.to(torch.uint8),
        scales=scales.to(torch.bfloat16),
        zero_points=None if scheme.symmetric else zeros.to(torch.uint8),
        group_index=torch.tensor([2, 0, 1] * 4, dtype=torch.int32) if grouped else None,
        scheme=scheme,
    )


def as_hex(tensor: torch.Tensor) -> list[list[str]]:
    """Each 32-bit word as eight hexadecimal digits, the highest first."""
    return [[f"{word & 0xFFFFFFFF:08x}" for word in row] for row in tensor.tolist()]


def vector(scheme: Scheme) -> dict[str, object]:
    """One vector, as JSON holds it."""
    tensor = make_tensor(scheme)
    packed = CompressedTensors().pack("m", tensor)
    zeros, index = packed.get("m.weight_zero_point"), packed.get("m.weight_g_idx")
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "activation_order": scheme.activation_order,
        "codes": tensor.codes.tolist(),
        "scales": tensor.scales.tolist(),
        "zero_points": None if tensor.zero_points is None else tensor.zero_points.tolist(),
        "weight": tensor.dequantize().tolist(),
        "weight_packed": as_hex(packed["m.weight_packed"]),
        "weight_zero_point": None if zeros is None else as_hex(zeros),
        "weight_shape": packed["m.weight_shape"].tolist(),
        "weight_g_idx": None if index is None else index.tolist(),
        "digest": tensor.digest(),
    }


def as_text(found: dict[str, object]) -> str:
    """JSON with one key a line, so that a difference can be read."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    VECTORS.mkdir(exist_ok=True)
    for name, case in CASES.items():
        (VECTORS / f"{name}.json").write_text(as_text(vector(case)), encoding="utf-8")
