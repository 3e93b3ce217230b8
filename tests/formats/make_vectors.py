"""Write the conformance vectors beside this file: small weights with their bytes spelled out.

One folder a format. Run from the repository root: ``python tests/formats/make_vectors.py``.
"""

import json
from pathlib import Path
from typing import Any

import torch

from llmopt.formats import choose_format
from llmopt.formats.base import Format
from llmopt.quantization.quantized_tensor import QuantizedTensor
from llmopt.quantization.scheme import Scheme

VECTORS = Path(__file__).parent / "vectors"
WORDS = {"weight_packed", "weight_zero_point", "qweight", "qzeros"}

CASES: dict[tuple[str, str | None], dict[str, tuple[Scheme, tuple[int, int]]]] = {
    ("compressed-tensors", None): {
        "w4_symmetric_group": (Scheme(4, 4, True), (3, 12)),
        "w4_asymmetric_group": (Scheme(4, 4, False), (9, 12)),
        "w4_asymmetric_channel": (Scheme(4, None, False), (9, 13)),
        "w8_symmetric_channel": (Scheme(8, None, True), (3, 13)),
        "w8_asymmetric_group": (Scheme(8, 4, False), (9, 12)),
        "w3_symmetric_channel": (Scheme(3, None, True), (3, 13)),
        "w3_asymmetric_channel": (Scheme(3, None, False), (9, 13)),
        "w2_symmetric_group": (Scheme(2, 4, True), (3, 12)),
        "w4_activation_order_group": (Scheme(4, 4, True, "group"), (3, 12)),
    },
    ("gptq", "gptq"): {
        "w4_symmetric_group": (Scheme(4, 8, True), (8, 24)),
        "w4_asymmetric_group": (Scheme(4, 8, False), (16, 24)),
        "w4_activation_order_group": (Scheme(4, 8, False, "group"), (8, 24)),
        "w3_asymmetric_channel": (Scheme(3, None, False), (32, 32)),
        "w8_symmetric_channel": (Scheme(8, None, True), (4, 12)),
        "w2_asymmetric_group": (Scheme(2, 16, False), (16, 32)),
    },
    ("gptq", "gptq_v2"): {
        "w4_symmetric_group": (Scheme(4, 8, True), (8, 24)),
        "w4_asymmetric_group": (Scheme(4, 8, False), (16, 24)),
        "w3_asymmetric_channel": (Scheme(3, None, False), (32, 32)),
    },
    ("awq", None): {
        "w4_asymmetric_group": (Scheme(4, 8, False), (16, 24)),
        "w4_asymmetric_channel": (Scheme(4, None, False), (8, 13)),
        "w4_symmetric_group": (Scheme(4, 4, True), (8, 12)),
    },
}


def make_tensor(scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    """Codes that count up through the rows, so that every nibble of the bytes can be checked.

    Zero points count up from 1, past the largest code to 1 again.
    """
    rows, columns = shape
    groups = columns // scheme.columns_per_group(columns)
    codes = (torch.arange(rows * columns) % (scheme.max_code + 1)).view(rows, columns)
    scales = (2.0 ** (torch.arange(rows * groups) % 5 - 3)).view(rows, groups)
    zeros = (torch.arange(rows * groups) % scheme.max_code + 1).view(rows, groups)
    grouped = scheme.activation_order == "group"
    order = torch.tensor([2, 0, 1], dtype=torch.int32)[:groups].repeat(columns // groups)
    return QuantizedTensor(
        codes=codes.to(torch.uint8),
        scales=scales.to(torch.bfloat16),
        zero_points=None if scheme.symmetric else zeros.to(torch.uint8),
        group_index=order if grouped else None,
        scheme=scheme,
    )


def as_hex(tensor: torch.Tensor) -> list[list[str]]:
    """Each 32-bit word as eight hexadecimal digits, the highest first."""
    return [[f"{word & 0xFFFFFFFF:08x}" for word in row] for row in tensor.tolist()]


def vector(form: Format, scheme: Scheme, shape: tuple[int, int]) -> dict[str, Any]:
    """One vector, as JSON holds it: the weight, and the ``parts`` of the file that stand for it."""
    tensor = make_tensor(scheme, shape)
    packed = form.pack("m", tensor)
    parts = {
        name.removeprefix("m."): as_hex(part) if name[2:] in WORDS else part.tolist()
        for name, part in packed.items()
    }
    return {
        "quantization_config": form.config({"m": scheme}, []),
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "activation_order": scheme.activation_order,
        "codes": tensor.codes.tolist(),
        "scales": tensor.scales.tolist(),
        "zero_points": None if tensor.zero_points is None else tensor.zero_points.tolist(),
        "group_index": None if tensor.group_index is None else tensor.group_index.tolist(),
        "weight": tensor.dequantize().tolist(),
        "parts": parts,
        "digest": tensor.digest(),
    }


def as_text(found: dict[str, Any]) -> str:
    """JSON with one key a line, so that a difference can be read."""
    flat = {key: json.dumps(value) for key, value in found.items() if key != "parts"}
    parts = [f"    {json.dumps(key)}: {json.dumps(part)}" for key, part in found["parts"].items()]
    flat["parts"] = "{\n" + ",\n".join(parts) + "\n  }"
    lines = [f"  {json.dumps(key)}: {text}" for key, text in flat.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    for (format_name, variant), cases in CASES.items():
        folder = VECTORS / (variant or format_name)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (case, size) in cases.items():
            found = vector(choose_format(format_name, variant), case, size)
            (folder / f"{name}.json").write_text(as_text(found), encoding="utf-8")
