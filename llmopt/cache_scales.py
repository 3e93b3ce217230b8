"""Static scales of an fp8 cache, from the largest keys and values on the calibration text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmopt.calibration.forwards import BlockForwards
from llmopt.checkpoint.ledger import Fate, LedgerEntry
from llmopt.errors import NumericalError
from llmopt.formats.kv_cache import SCALE_PARTS, attention_names, scale_tensor
from llmopt.kv_cache.attention import attention_through
from llmopt.kv_cache.reading import CacheView
from llmopt.report.schema import CacheScaleRecord


@dataclass(frozen=True, slots=True)
class CacheScales:
    """Of one block: the tensors to write, by name, with a ledger line each; and a record."""

    tensors: Mapping[str, Tensor]
    entries: tuple[LedgerEntry, ...]
    record: CacheScaleRecord


class _Seen(Exception):  # noqa: N818  (no error: ends a forward that has shown its keys)
    pass


@torch.no_grad()
def find_scales(forwards: BlockForwards, dtype: torch.dtype) -> CacheScales:
    """Run a block, as quantized by now, as far as its attention over the calibration batches.

    Keys are taken after the rotary embedding, as a cache gets them; one scale a layer for all
    heads, as vLLM reads it.

    Args:
        forwards: of the block, over the calibration batches.
        dtype: of the scales on disk; they are rounded up to it, so that the largest fits.

    Raises:
        NumericalError: NaN or infinity among keys or values; block and batch are named.
    """
    walker, block, module = forwards.walker, forwards.block, forwards.module
    structure = walker.structure
    largest = [0.0, 0.0]
    config = structure.skeleton.config
    name = attention_names(structure)[block]
    for index in range(forwards.inputs.num_batches):
        see = partial(_note, largest, f"{name} on batch {index} of the calibration text")
        with attention_through(config, see):
            try:
                walker.forward(block, module, index, forwards.inputs.read(index))
            except _Seen:
                continue
        raise AssertionError(f"{structure.block_prefix(block)} ran without its attention")
    tensors = {
        f"{name}.{part}": scale_tensor(value, dtype)
        for part, value in zip(SCALE_PARTS, largest, strict=True)
    }
    scales = [float(tensor) for tensor in tensors.values()]
    return CacheScales(
        tensors,
        tuple(_entry(tensor) for tensor in tensors),
        CacheScaleRecord(
            block=block,
            attention=name,
            largest_key=largest[0],
            largest_value=largest[1],
            k_scale=scales[0],
            v_scale=scales[1],
        ),
    )


def _note(largest: list[float], place: str, _: int, keys: Tensor, values: Tensor) -> CacheView:
    for index, (what, tensor) in enumerate((("keys", keys), ("values", values))):
        found = float(tensor.abs().max())
        if not math.isfinite(found):
            raise NumericalError(
                f"{place} computes {what} of NaN or infinity", "check the source model"
            )
        largest[index] = max(largest[index], found)
    raise _Seen


def _entry(name: str) -> LedgerEntry:
    reason = "scale of the fp8 cache: the largest magnitude on the calibration text / 448"
    return LedgerEntry(name=name, fate=Fate.ADDED, reason=reason, num_bytes=0, num_parameters=0)
