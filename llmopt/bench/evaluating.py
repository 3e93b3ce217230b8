"""One evaluator for every quantizer: dequantizes what lies on disk itself, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmopt.calibration.tokenizer import load_tokenizer
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import ModelStructure, read_structure
from llmopt.checkpoint.tensor_names import ConfiguredSource
from llmopt.formats.dequantized import DequantizedSource
from llmopt.scoring import WalkerScorer
from llmopt.texts import prepare_evaluation
from llmopt_evals.divergence import measure_block


@dataclass(frozen=True, slots=True)
class Quality:
    """An output against its source on held-out text.

    Attributes:
        perplexity: of the output; all tokens weighted alike.
        reference_perplexity: of the source.
        kl: mean KL(source || output) a token, in nats.
        top1: share of tokens where both find the same token most likely.
        num_tokens: predicted tokens.
    """

    perplexity: float
    reference_perplexity: float
    kl: float
    top1: float
    num_tokens: int


class Evaluator:
    """Scores the source once, and every output against it on the same blocks.

    Args:
        model: folder of the source.
        blocks: held-out tokens, each ``(T,) int64``.
        scratch: folder for hidden states.
    """

    def __init__(self, model: Path, blocks: Sequence[torch.Tensor], scratch: Path) -> None:
        reader = open_checkpoint(model)
        self._blocks = tuple(blocks)
        self._scratch = scratch
        self._structure = read_structure(reader)
        self._reference = WalkerScorer(self._structure, reader, scratch).score(self._blocks)

    @property
    def structure(self) -> ModelStructure:
        """Of the source."""
        return self._structure

    def __call__(self, output: Path) -> Quality:
        """Measure a quantized checkpoint.

        Raises:
            BadInputError: it cannot be opened, or not by any of our formats.
            NotFiniteError: it computes NaN or infinity.
        """
        return self.measure(DequantizedSource(open_checkpoint(output)), output.name)

    def measure(self, source: ConfiguredSource, name: str) -> Quality:
        """Measure any view of an output under the source's names; ``name`` is for messages.

        Raises:
            BadInputError: it holds another model.
            NotFiniteError: it computes NaN or infinity.
        """
        scores = WalkerScorer(read_structure(source), source, self._scratch).score(self._blocks)
        parts = [
            measure_block(block, index, self._reference, [scores], [name], f"block {index}")
            for index, block in enumerate(self._blocks)
        ]
        found = [divergences[0] for divergences in parts]
        kl, agrees, own, reference = (
            np.concatenate([getattr(part, name) for part in found]).astype(np.float64)
            for name in ("kl", "agrees", "nll_candidate", "nll_reference")
        )
        return Quality(
            perplexity=float(np.exp(own.mean())),
            reference_perplexity=float(np.exp(reference.mean())),
            kl=float(kl.mean()),
            top1=float(agrees.mean()),
            num_tokens=len(kl),
        )


def held_out_blocks(model: Path, max_tokens: int) -> list[torch.Tensor]:
    """The built-in text's evaluation split as blocks, of ``max_tokens`` in all or a block more.

    Raises:
        BadInputError: a tokenizer that cannot be opened, or a context that is too short.
    """
    structure = read_structure(open_checkpoint(model))
    tokenizer = load_tokenizer(model).tokenizer
    text = prepare_evaluation(["builtin"], tokenizer, context_length=structure.context_length).text
    blocks: list[torch.Tensor] = []
    for block in (block for unit in text.units for block in unit.blocks):
        if sum(map(len, blocks)) >= max_tokens:
            break
        blocks.append(block)
    return blocks
