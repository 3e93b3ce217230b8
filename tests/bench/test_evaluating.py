"""The common evaluator, against the definitions computed by transformers in one go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench.conftest import Made
from safetensors.torch import save_file
from support.small_jobs import VOCAB_SIZE

from llmopt.bench.evaluating import Evaluator
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.errors import BadInputError
from llmopt.formats.dequantized import DequantizedSource

LENGTHS = (17, 40, 9)


@pytest.fixture(scope="module")
def blocks() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]


@torch.inference_mode()
def log_probs(folder: Path, blocks: list[torch.Tensor]) -> torch.Tensor:
    """``(tokens, vocabulary) float64`` of all predicted tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = [model(block[None]).logits[0, :-1] for block in blocks]
    return torch.cat(logits).double().log_softmax(-1)


def test_quality_is_what_transformers_computes_from_the_dequantized_weights(
    made: Made, blocks: list[torch.Tensor], tmp_path: Path
) -> None:
    source = DequantizedSource(open_checkpoint(made.output))
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(
        {name: source.read(name).float() for name in source.names}, plain / "model.safetensors"
    )
    (plain / "config.json").write_bytes((made.source / "config.json").read_bytes())
    p, q = log_probs(made.source, blocks), log_probs(plain, blocks)
    targets = torch.cat([block[1:] for block in blocks])[:, None]

    quality = Evaluator(made.source, blocks, tmp_path)(made.output)
    assert quality.num_tokens == sum(LENGTHS) - len(LENGTHS)
    assert quality.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert quality.perplexity == pytest.approx(
        float((-q.gather(1, targets)).mean().exp()), rel=1e-5
    )
    assert quality.reference_perplexity == pytest.approx(
        float((-p.gather(1, targets)).mean().exp()), rel=1e-5
    )
    assert quality.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert quality.kl > 0


def test_what_is_not_quantized_is_refused(
    made: Made, blocks: list[torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match="not quantized"):
        Evaluator(made.source, blocks, tmp_path)(made.source)
