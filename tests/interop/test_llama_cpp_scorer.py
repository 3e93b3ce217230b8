"""llama.cpp as a scorer gives the perplexity of the same file's dequantized weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from interop.protocol import CONSUMERS_FOLDER
from support import gguf_models, tiny_models
from support.gguf_models import open_and_plan, write_plain
from support.tokenizers_of_each_kind import lines, training_text
from torch import Tensor

from llmopt.calibration.tokenizer import encode, load_tokenizer
from llmopt.checkpoint.structure import read_structure
from llmopt.demo.paths import demo_model_path
from llmopt.formats.gguf.source import GGUFSource
from llmopt.formats.gguf.tokenizer import tokenizer_metadata
from llmopt.formats.gguf.values import TypedValue, string, strings
from llmopt.formats.gguf.writer import TensorEntry, write_gguf
from llmopt.quantization.ggml.packing import pack_blocks, pack_plain
from llmopt.quantization.ggml.quantize import quantize_blocks
from llmopt.quantization.ggml.types import GGML_TYPES, fitting_type
from llmopt.scoring import WalkerScorer
from llmopt_evals.divergence import kl_divergence
from llmopt_evals.scorer import Branches, Scores

ROOT = Path(__file__).parents[2]
NUM_TOKENS = 250
# Type -> largest difference of the mean log-probability of a token, largest mean divergence, and
# largest mean difference of a continuation's log-probability. llama.cpp rounds activations
# to the type that it multiplies in: 16 bits for 16-bit weights, 8 for blocks.
TOLERANCES = {
    "F32": (1e-6, 1e-9, 1e-4),
    "F16": (3e-3, 2e-3, 0.15),
    "BF16": (3e-3, 2e-3, 0.15),
    "Q8_0": (3e-3, 2e-3, 0.15),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS"), (6e-3, 4e-3, 0.3)),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), (6e-3, 4e-3, 0.3)),
}


def write_file(path: Path, kind: str) -> None:
    """The built-in model with its matrices in one type."""
    source = Path(demo_model_path())
    reader, plan = open_and_plan(source)
    planned = {tensor.gguf_name: tensor for tensor in plan.tensors}
    types = {
        name: fitting_type(GGML_TYPES[kind], tensor.shape[-1])
        if tensor.is_matrix
        else GGML_TYPES["F32"]
        for name, tensor in planned.items()
    }
    entries = [TensorEntry(name, types[name], planned[name].shape) for name in planned]

    def packed(entry: TensorEntry) -> Tensor:
        tensor = planned[entry.name]
        weight = tensor.assemble([reader.read(name).float() for name in tensor.sources])
        if entry.type.is_plain:
            return pack_plain(weight, entry.type)
        return pack_blocks(quantize_blocks(weight, entry.type, search="compatible"))

    vocabulary = reader.info("model.embed_tokens.weight").shape[0]
    values = {**plan.metadata, **tokenizer_metadata(source, vocabulary).values}
    write_gguf(path, plan.architecture, values, entries, packed)


def passages() -> tuple[list[Tensor], list[tuple[Tensor, tuple[Tensor, ...]]]]:
    """Plain sequences of several lengths, and contexts with four continuations each."""
    tokenizer = load_tokenizer(Path(demo_model_path())).tokenizer
    text = "\n".join(lines(training_text(), 600))
    ids = torch.tensor(encode([text], tokenizer)[0])
    plain = [ids[start : start + NUM_TOKENS - start % 7] for start in range(0, 1500, NUM_TOKENS)]
    branches = [
        (ids[start : start + 60], tuple(ids[start + 60 + 9 * i :][: 5 + i] for i in range(4)))
        for start in range(1500, 2300, 200)
    ]
    return plain, branches


def through_llama_cpp(python: Path, file: Path, exact: bool, asked: Any) -> dict[str, Any]:
    request, response = file.with_suffix(".request"), file.with_suffix(".response")
    plain, branches = asked
    content = {"file": str(file), "exact": exact, "plain": plain, "branches": branches}
    torch.save(content, request)
    site = next((python.parent.parent / "lib").glob("python*/site-packages"))
    script = CONSUMERS_FOLDER / "score_with_llama_cpp.py"
    done = subprocess.run(
        [sys.executable, str(script), str(site), str(request), str(response)],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'evals'}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[str, Any] = torch.load(response)
    return found


@pytest.mark.interop
@pytest.mark.parametrize("python", ["llama-cpp"], indirect=True)
def test_branches_of_a_model_with_windows_see_their_context(python: Path, tmp_path: Path) -> None:
    """Gemma 2's even blocks look back over 8 tokens; what they forgot, odd blocks still need."""
    tiny_models.write_checkpoint(tmp_path / "source", gguf_models.CONFIGS["gemma2"](), seed=5)
    reader, plan = open_and_plan(tmp_path / "source")
    write_plain(tmp_path / "m.gguf", reader, plan, plain_vocabulary())
    ids = torch.arange(1, 200) * 37 % (tiny_models.VOCABULARY - 4)
    branches = [(ids[:29], (ids[29:32], ids[50:62], ids[70:71])), (ids[3:5], (ids[9:40],))]
    found = through_llama_cpp(python, tmp_path / "m.gguf", True, ([ids[:40]], branches))
    source = GGUFSource(tmp_path / "m.gguf")
    walker = WalkerScorer(read_structure(source), source, tmp_path)
    scores = walker.score([ids[:40], *(Branches(*item) for item in branches)])
    torch.testing.assert_close(found["logits"][0], scores.logits(0, 0, 40), atol=0.02, rtol=0)
    for theirs, ours in zip(found["logprobs"], scores.branch_logprobs([1, 2]), strict=True):
        torch.testing.assert_close(theirs, ours, atol=0.02 * 31, rtol=1e-3)


def plain_vocabulary() -> dict[str, TypedValue]:
    """Of nothing in particular: only ids are asked."""
    tokens = [f"t{index}" for index in range(tiny_models.VOCABULARY)]
    return {
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string("gpt-2"),
        "tokenizer.ggml.tokens": strings(tokens),
        "tokenizer.ggml.merges": strings(["t 0"]),
    }


def mean_logprob(logits: Sequence[Tensor], tokens: Sequence[Tensor]) -> float:
    parts = [
        torch.log_softmax(rows[:-1].double(), -1).gather(1, ids[1:, None])
        for rows, ids in zip(logits, tokens, strict=True)
    ]
    return float(torch.cat(parts).mean())


@pytest.mark.interop
@pytest.mark.parametrize("python", ["llama-cpp"], indirect=True)
@pytest.mark.parametrize("kind", TOLERANCES)
def test_perplexity_is_that_of_the_dequantized_weights(
    python: Path, kind: str, tmp_path: Path
) -> None:
    write_file(tmp_path / "m.gguf", kind)
    source = GGUFSource(tmp_path / "m.gguf")
    plain, branches = asked = passages()
    walker = WalkerScorer(read_structure(source), source, tmp_path)
    ours: Scores = walker.score([*plain, *(Branches(*item) for item in branches)])
    rows = [ours.logits(i, 0, len(tokens)) for i, tokens in enumerate(plain)]
    theirs = through_llama_cpp(python, tmp_path / "m.gguf", kind == "F32", asked)
    difference = abs(mean_logprob(rows, plain) - mean_logprob(theirs["logits"], plain))
    divergence = float(kl_divergence(torch.cat(rows), torch.cat(theirs["logits"])).mean())
    logprobs = ours.branch_logprobs(range(len(plain), len(plain) + len(branches)))
    apart = float((torch.stack(logprobs) - torch.stack(theirs["logprobs"])).abs().mean())
    print(f"{kind}: log-probability {difference:.1e}, KL {divergence:.1e}, branches {apart:.1e}")
    largest = TOLERANCES[kind]
    assert difference < largest[0] and divergence < largest[1] and apart < largest[2]
