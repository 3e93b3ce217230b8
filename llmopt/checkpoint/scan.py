"""One reading of every byte: content hashes, and no NaN or infinity in a weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from llmopt.checkpoint.tensor_source import TensorSource
from llmopt.errors import BadInputError
from llmopt.progress import Progress

CHUNK_ELEMENTS = 1 << 22


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 (hex) of a tensor's bytes, row-major, in chunks."""
    return _digest_and_check(tensor)[0]


def scan_tensors(source: TensorSource, progress: Progress) -> dict[str, str]:
    """Name → SHA-256 of the tensor's bytes; each byte is read once.

    Raises:
        BadInputError: naming the tensors that hold NaN or infinity, with the first place in each.
    """
    names = source.names
    total = sum(source.info(name).num_bytes for name in names)
    done = 0
    digests: dict[str, str] = {}
    bad: list[str] = []
    for name in names:
        progress("scan weights", done, total)
        digests[name], first_bad = _digest_and_check(source.read(name))
        if first_bad is not None:
            bad.append(f"{name} (first at flat index {first_bad})")
        done += source.info(name).num_bytes
    progress("scan weights", done, total)
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        hold = "tensor holds" if len(bad) == 1 else "tensors hold"
        raise BadInputError(
            f"{len(bad)} {hold} NaN or infinity: {', '.join(bad[:5])}{more}",
            "download the checkpoint again; if it is your own, its training or merge went wrong",
        )
    return digests


def combined_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 (hex) over name → digest, whatever their order or how they are sharded."""
    listing = json.dumps(sorted(digests.items()), separators=(",", ":"))
    return hashlib.sha256(listing.encode()).hexdigest()


def _digest_and_check(tensor: Tensor) -> tuple[str, int | None]:
    """SHA-256 and the flat index of the first NaN or infinity."""
    flat = tensor.detach().reshape(-1)
    can_be_bad = flat.is_floating_point() or flat.is_complex()
    digest = hashlib.sha256()
    first_bad: int | None = None
    for begin in range(0, flat.numel(), CHUNK_ELEMENTS):
        chunk = flat[begin : begin + CHUNK_ELEMENTS].cpu().contiguous()
        digest.update(chunk.view(torch.uint8).numpy().data)
        if can_be_bad and first_bad is None:
            place = _first_not_finite(chunk)
            first_bad = None if place is None else begin + place
    return digest.hexdigest(), first_bad


def _first_not_finite(chunk: Tensor) -> int | None:
    if chunk.is_complex():
        chunk = torch.view_as_real(chunk).abs().amax(-1)
    elif chunk.dtype.itemsize == 1:  # float8 has no arithmetic of its own
        chunk = chunk.float()
    # NaN goes through minimum and maximum, so that one pass without a temporary tells.
    low, high = torch.aminmax(chunk)
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return None
    return int(torch.nonzero(~torch.isfinite(chunk))[0])
