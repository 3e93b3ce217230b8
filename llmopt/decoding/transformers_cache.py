"""The quantized cache for ``model.generate(past_key_values=...)`` of transformers.

fp8 and int8 read what the engine reads: every token quantized when it is written, a query's own
too. int4 cannot quite: a ``Cache`` hands one tensor to all queries of a forward, where the engine
lets the query at position ``p`` read int4 before ``boundary(p)`` and 16 bit from there. Here the
boundary is that of the forward's first query. Token by token this is the engine's cache; a prompt
that goes through in one forward reads itself in 16 bit throughout, and is quantized afterwards.
Codes are decoded anew at every step and handed over in the model's element type: this saves
memory between steps, not time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from llmopt.decoding.attention.hook import find_layers
from llmopt.decoding.kv.codes import (
    KEY_AXIS,
    VALUE_AXIS,
    decode_fp8,
    decode_int4,
    decode_int8,
    encode_fp8,
    encode_int4,
    encode_int8,
)
from llmopt.decoding.kv.layers import AttentionLayer
from llmopt.decoding.kv_cache_config import KVCacheConfig, int4_boundary, kv_cache_config
from llmopt.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QuantizedKVCache(Cache):
    """A cache for one ``generate`` call, kept as ``config`` says.

    Args:
        model: whose layers it is for; one token goes through it, to find their windows.
        config: a kind (``"fp8"``, ``"int8"``, ``"int4"``, ``"auto"``) or all of it; ``page_size``
            matters to int4 alone.

    Raises:
        BadInputError: a kind that is not known, or a model whose layers are not served.
    """

    def __init__(self, model: PreTrainedModel, config: str | KVCacheConfig) -> None:
        chosen = kv_cache_config(config)
        if chosen.kind in ("bf16", "fp16", "fp32"):
            raise BadInputError(
                f"transformers keeps keys and values in the model's own element type, not in "
                f"{chosen.kind}",
                "load the model in that type, or choose fp8, int8 or int4",
            )
        super().__init__(layers=[_new_layer(layer, chosen) for layer in find_layers(model)])

    @property
    def num_bytes(self) -> int:
        """Of all codes, scales, minima and 16-bit tokens that are held."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers
            for tensor in (
                layer.parts if isinstance(layer, _QuantizedLayer) else _keys_and_values(layer)
            ).values()
        )


def _keys_and_values(layer: Any) -> dict[str, Tensor]:
    return {"k": layer.keys, "v": layer.values} if layer.is_initialized else {}


def _new_layer(layer: AttentionLayer, config: KVCacheConfig) -> CacheLayerMixin:
    if config.kind == "auto" or (
        # Its int4 pages would never be read.
        config.kind == "int4" and layer.window is not None and layer.window <= config.recent_window
    ):
        if layer.window is not None:
            return DynamicSlidingWindowLayer(layer.window)
        return DynamicLayer()  # type: ignore[no-untyped-call]
    kind = _Int4Layer if config.kind == "int4" else _TokenLayer
    return kind(layer, config)


class _QuantizedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """What both kinds share: how many tokens were seen, and tensors whose first axis is the batch.

    Attributes:
        parts: the tensors by name.
        seen: tokens of each sequence.
    """

    is_croppable = False  # what a code was made of is gone

    def __init__(self, layer: AttentionLayer, config: KVCacheConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer, self.config = layer, config
        self.is_sliding = layer.window is not None
        self.parts: dict[str, Tensor] = {}
        self.seen = 0

    def first_held(self) -> int:
        """Position of the first token that the next query may see."""
        return 0 if self.layer.window is None else max(0, self.seen + 1 - self.layer.window)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that ``update`` will give back, and the position of the first."""
        return self.seen + query_length - self.first_held(), self.first_held()

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.parts, self.seen, self.is_initialized = {}, 0, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequences in another order, for beam search."""
        self._each(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        self._each(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some sequences."""
        self._each(lambda part: part[indices])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.parts = {name: change(part) for name, part in self.parts.items()}

    def _append(self, axis: int, **new: Tensor) -> None:
        for name, part in new.items():
            old = self.parts.get(name)
            self.parts[name] = part if old is None else torch.cat([old, part], axis)


class _TokenLayer(_QuantizedLayer):  # type: ignore[no-untyped-call]
    """fp8 and int8: codes ``(batch, kv_heads, tokens, head_dim)``, of int8 a scale each row."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True
        scales = (self.config.fp8_scales or {}).get(self.layer.index)
        ones = (1.0,) * self.layer.num_kv_heads
        given = (ones, ones) if scales is None else (scales.k, scales.v)
        self.scales = [torch.tensor(x, device=key_states.device)[:, None] for x in given]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new: dict[str, Tensor] = {}
        for name, x, scale in zip("kv", (key_states, value_states), self.scales, strict=True):
            if self.config.kind == "fp8":
                # As bytes: torch joins and reorders those on every device.
                new[name] = encode_fp8(x, scale).view(torch.uint8)
            else:
                new[name], new[f"{name}_scale"] = encode_int8(x)
        held = self.seen - self.first_held()
        self._each(lambda part: part[:, :, part.shape[2] - held :])
        self._append(2, **new)
        self.seen += key_states.shape[2]
        k, v = (self._read(name, key_states.dtype) for name in "kv")
        return k, v

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        codes = self.parts[name]
        if self.config.kind == "int8":
            return decode_int8(codes, self.parts[f"{name}_scale"], dtype)
        return decode_fp8(codes.view(torch.float8_e4m3fn), self.scales["kv".index(name)], dtype)


class _Int4Layer(_QuantizedLayer):  # type: ignore[no-untyped-call]
    """int4: pages ``(batch, pages, page_size, ...)``, and the tokens behind them in 16 bit."""

    first_page = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def reset(self) -> None:
        super().reset()
        self.first_page = 0

    def first_held(self) -> int:
        page = self.config.page_size
        return super().first_held() // page * page

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        self._quantize_up_to(int4_boundary(self.seen, self.config.recent_window, self._page))
        self._drop_pages()
        self._append(2, k=key_states, v=value_states)
        self.seen += key_states.shape[2]
        k, v = (self._read(name, axis) for name, axis in (("k", KEY_AXIS), ("v", VALUE_AXIS)))
        return k, v

    @property
    def _page(self) -> int:
        return self.config.page_size

    def _num_pages(self) -> int:
        return self.parts["k_codes"].shape[1] if "k_codes" in self.parts else 0

    def _quantize_up_to(self, boundary: int) -> None:
        pages = boundary // self._page - self.first_page - self._num_pages()
        if pages <= 0:
            return
        for name, axis in (("k", KEY_AXIS), ("v", VALUE_AXIS)):
            tokens = self.parts[name]
            batch, heads, _, channels = tokens.shape
            full = tokens[:, :, : pages * self._page].transpose(1, 2)
            made = encode_int4(full.reshape(-1, self._page, heads, channels), axis)
            by_name = zip(("codes", "scale", "minimum"), made, strict=True)
            self._append(
                1, **{f"{name}_{part}": x.view(batch, pages, *x.shape[1:]) for part, x in by_name}
            )
            self.parts[name] = tokens[:, :, pages * self._page :].contiguous()

    def _drop_pages(self) -> None:
        gone = self.first_held() // self._page - self.first_page
        if gone > 0:
            self.parts = {
                name: part[:, gone:] if "_" in name else part for name, part in self.parts.items()
            }
            self.first_page += gone

    def _read(self, name: str, axis: int) -> Tensor:
        latest = self.parts[name]
        if not self._num_pages():
            return latest
        codes, scale, minimum = (
            self.parts[f"{name}_{part}"].flatten(0, 1) for part in ("codes", "scale", "minimum")
        )
        scale, minimum = scale.unsqueeze(axis), minimum.unsqueeze(axis)
        pages = decode_int4(codes, scale, minimum, latest.dtype)
        tokens = pages.view(len(latest), -1, *pages.shape[2:]).transpose(1, 2)
        return torch.cat([tokens, latest], 2)
