"""A tiny checkpoint, and what llmopt's own runner makes of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.small_jobs import VOCAB_SIZE, small_recipe, write_job, write_text

from llmopt.bench.measuring import Request
from llmopt.bench.runners import run_llmopt


@dataclass(frozen=True)
class Made:
    """A source, its quantized output, what the runner answered, and the tokens it was given."""

    source: Path
    output: Path
    response: dict[str, Any]
    tokens: torch.Tensor


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """llmopt's runner in this process, on tokens that no text of it holds."""
    folder = tmp_path_factory.mktemp("bench")
    source, output = write_job(folder), folder / "output"
    recipe = folder / "small.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(write_text(folder)).model_dump(mode="json")))
    tokens = torch.randint(VOCAB_SIZE, (3, 32), generator=torch.Generator().manual_seed(3))
    request = Request(
        str(source), str(output), tokens.tolist(), "gptq", 4, 32, True, 1, {"recipe": str(recipe)}
    )
    with pytest.MonkeyPatch.context() as patch:
        for owner, attribute, _ in run_llmopt.PHASES:  # the runner has a process of its own
            patch.setattr(owner, attribute, getattr(owner, attribute))
        response = run_llmopt.quantize(asdict(request))
    return Made(source, output, response, tokens)
