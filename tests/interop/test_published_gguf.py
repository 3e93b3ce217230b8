"""What ``llmopt quantize`` published as GGUF answers in llama.cpp as our evaluation predicts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from interop.protocol import CONSUMERS_FOLDER

from llmopt.bench.environments import clean_variables
from llmopt.calibration.tokenizer import encode, load_tokenizer
from llmopt.checkpoint.structure import read_structure
from llmopt.demo.paths import demo_model_path
from llmopt.formats.gguf.source import GGUFSource
from llmopt.scoring import WalkerScorer

PROMPTS = (
    "Return a new list containing",
    "The module provides functions",
    "def parse(text):\n    ",
    "Raises an exception if the file",
)
NUM_TOKENS = 24
# Nats between a token and our best one that llama.cpp's rounding of activations to 8 bits can turn.
NOISE = 0.15


@pytest.mark.interop
@pytest.mark.parametrize("python", ["llama-cpp"], indirect=True)
@pytest.mark.parametrize("recipe", ["gguf-q4_k_m", "gguf-q4_k_m-fast"])
def test_llama_cpp_answers_with_the_tokens_that_our_evaluation_predicts(
    python: Path, recipe: str, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    file = quantized(recipe)
    request, response = tmp_path / "request.json", tmp_path / "response.json"
    asked = {"model": str(file), "prompts": PROMPTS, "num_tokens": NUM_TOKENS}
    request.write_text(json.dumps(asked), "utf-8")
    script = CONSUMERS_FOLDER / "continue_with_llama_cpp.py"
    done = subprocess.run(
        [str(python), str(script), str(request), str(response)],
        cwd=tmp_path,
        env=clean_variables(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    answers = json.loads(response.read_text("utf-8"))
    tokenizer = load_tokenizer(Path(demo_model_path())).tokenizer
    assert [answer["prompt"] for answer in answers] == encode(list(PROMPTS), tokenizer)

    source = GGUFSource(file)
    scorer = WalkerScorer(read_structure(source), source, tmp_path)
    scores = scorer.score([torch.tensor(item["prompt"] + item["answer"]) for item in answers])
    same = 0
    for index, answer in enumerate(answers):
        first = len(answer["prompt"]) - 1
        logits = scores.logits(index, first, first + NUM_TOKENS)
        chosen = logits.gather(1, torch.tensor(answer["answer"]).unsqueeze(1)).squeeze(1)
        behind = logits.amax(dim=1) - chosen
        assert float(behind.max()) < NOISE
        same += int((behind == 0).sum())
    print(f"{recipe}: {same} of {NUM_TOKENS * len(PROMPTS)} tokens are our best ones")
    assert same >= 0.9 * NUM_TOKENS * len(PROMPTS)
