"""Long contexts: held-out text joined up to them, and what a cache costs at their far end.

A cache shows its errors where much of it is read. Units of the gate have at most a thousand tokens,
so for this they are joined, in an order drawn once, into contexts of one length; a context is then
what is resampled. The candidate is compared with itself, with a 16-bit cache in place of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from llmopt_evals.divergence import kl_divergence
from llmopt_evals.errors import EvaluationError, NotFiniteError
from llmopt_evals.scorer import Scorer
from llmopt_evals.units import MIN_UNITS, HeldOutText

MIN_CONTEXT_TOKENS = 64
_ROWS = 128  # of logits in memory at a time
_BUCKETS = 8


class LongContextOptions(BaseModel):
    """How a quantized cache is judged.

    Attributes:
        max_tokens: contexts are the model's, but at most this.
        num_contexts: of joined text; fewer than 30 are refused.
        recall_passages: of each length, for the retrieval task.
        recall_pairs: key-value pairs in each passage, each asked for once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int = Field(default=8192, ge=MIN_CONTEXT_TOKENS)
    num_contexts: int = Field(default=32, ge=MIN_UNITS)
    recall_passages: int = Field(default=32, ge=MIN_UNITS)
    recall_pairs: int = Field(default=16, ge=4)


@dataclass(frozen=True, slots=True, eq=False)
class CacheDivergence:
    """KL of a candidate with its cache from the same candidate with a 16-bit cache.

    Attributes:
        num_tokens: a context.
        kl: ``(contexts,) float64``, nats, summed over the second half of each.
        tokens: ``(contexts,) float64``, how many tokens that is.
        by_position: ``(contexts, tokens - 1) float32``, of every token.
    """

    num_tokens: int
    kl: NDArray[np.float64]
    tokens: NDArray[np.float64]
    by_position: NDArray[np.float32]

    def buckets(self) -> list[tuple[int, int, float]]:
        """``(start, stop, mean KL)`` of equal parts of the context."""
        bounds = np.linspace(0, self.by_position.shape[1], _BUCKETS + 1).astype(int)
        return [
            (int(start), int(stop), float(self.by_position[:, start:stop].mean(dtype=np.float64)))
            for start, stop in zip(bounds, bounds[1:], strict=False)
        ]


def first_judged(num_tokens: int) -> int:
    """The first position of a context whose KL counts: its second half begins there."""
    return (num_tokens - 1) // 2


def context_tokens(
    text: HeldOutText,
    context_length: int | None,
    options: LongContextOptions,
    first_quantized: int = 0,
) -> int:
    """Tokens of the contexts: the model's, as far as the options and the text go.

    Args:
        text: held out.
        context_length: the model's, or ``None`` without a limit.
        options: how much of it.
        first_quantized: the first position whose query reads anything quantized of the cache.

    Raises:
        EvaluationError: so little text that its contexts would be no long ones, or contexts so
            short that positions would be judged which read nothing quantized.
    """
    available = len(flatten(text)) // options.num_contexts + (text.bos_token_id is not None)
    wanted = min(context_length or options.max_tokens, options.max_tokens)
    if min(wanted, available) < MIN_CONTEXT_TOKENS:
        raise EvaluationError(
            f"the held-out text makes {options.num_contexts} contexts of {available} tokens; a "
            f"quantized cache is judged on contexts of at least {MIN_CONTEXT_TOKENS}",
            "give more held-out text",
        )
    num_tokens = min(wanted, available)
    if first_judged(num_tokens) < first_quantized:
        needed = 2 * first_quantized + 1
        limit = "the model" if wanted == context_length else "gate.long_context.max_tokens"
        limit = "the held-out text" if available < wanted else limit
        raise EvaluationError(
            f"the cache would be judged on contexts of {num_tokens:,} tokens, as {limit} allows, "
            f"from position {first_judged(num_tokens):,} on, but positions before "
            f"{first_quantized:,} read nothing quantized: that would judge the 16-bit cache",
            f"see to contexts of {needed:,} tokens or more (more held-out text, a larger "
            "gate.long_context.max_tokens), or choose a smaller kv_cache.recent_window or "
            "kv_cache.page_size",
        )
    return num_tokens


def flatten(text: HeldOutText, seed: int = 0) -> Tensor:
    """``(tokens,) int64``: all units joined in an order drawn once, without what heads them."""
    skip = int(text.bos_token_id is not None)
    order = np.random.default_rng(seed).permutation(len(text.units))
    return torch.cat([block[skip:] for index in order for block in text.units[index].blocks])


def join_contexts(text: HeldOutText, num_tokens: int, num_contexts: int, seed: int) -> list[Tensor]:
    """Contexts ``(num_tokens,) int64`` that share no text; each begins as the units do."""
    head = [] if text.bos_token_id is None else [text.bos_token_id]
    room = num_tokens - len(head)
    tokens = flatten(text, seed)
    first = torch.tensor(head, dtype=torch.int64)
    return [
        torch.cat([first, tokens[index * room : (index + 1) * room]])
        for index in range(num_contexts)
    ]


@torch.inference_mode()
def measure_cache(
    contexts: Sequence[Tensor], with_cache: Scorer, sixteen_bit: Scorer
) -> CacheDivergence:
    """Score the contexts with both caches.

    Raises:
        NotFiniteError: NaN or infinite logits; names the model.
    """
    ours, theirs = with_cache.score(contexts), sixteen_bit.score(contexts)
    rows = []
    for index, context in enumerate(contexts):
        parts = []
        for start in range(0, len(context) - 1, _ROWS):
            stop = min(start + _ROWS, len(context) - 1)
            reference = theirs.logits(index, start, stop)
            kl = kl_divergence(reference, ours.logits(index, start, stop).to(reference.device))
            if not bool(torch.isfinite(kl).all()):
                raise NotFiniteError("candidate", f"in long context {index} near position {start}")
            parts.append(kl.clamp(min=0.0).cpu())
        rows.append(torch.cat(parts).numpy())
    by_position = np.stack(rows)
    half = by_position[:, first_judged(len(contexts[0])) :]
    return CacheDivergence(
        num_tokens=len(contexts[0]),
        kl=half.sum(1, dtype=np.float64),
        tokens=np.full(len(rows), float(half.shape[1])),
        by_position=by_position,
    )
