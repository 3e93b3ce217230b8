"""generate with the quantized cache says what the engine's cache says."""

import pytest
import torch
from decoding.stepping import greedy
from support.tiny_models import CONFIGS, build_model

from llmopt.decoding.kv.layout import PoolLimits
from llmopt.decoding.kv_cache_config import HeadScales, KVCacheConfig
from llmopt.decoding.runner import Runner
from llmopt.decoding.transformers_cache import QuantizedKVCache
from llmopt.errors import BadInputError

SCALES = HeadScales(k=(0.02, 0.01), v=(0.01, 0.02))


def generate(model, prompts, cache, num_tokens, **options):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=num_tokens,
        min_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    return out[:, longest:].tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "qwen2", "smollm3"])
@pytest.mark.parametrize("kind", ["fp8", "int8", "int4", "auto"])
def test_the_engine_and_the_cache_agree(family, kind):
    model = build_model(CONFIGS[family](eos_token_id=None), seed=2)
    prompt = list(range(30, 71)) if kind in ("fp8", "int8") else [30, 31, 32, 33]
    scales = {layer: SCALES for layer in range(3)} if kind == "fp8" else None
    config = KVCacheConfig(kind, page_size=16, recent_window=4, fp8_scales=scales)
    runner = Runner(model, config, PoolLimits(num_pages=8))
    (expected,), _, _ = greedy(runner, [prompt], 44, page_size=16)
    cache = QuantizedKVCache(model, config)
    assert generate(model, [prompt], cache, 44) == [expected]
    assert cache.get_seq_length() == len(prompt) + 43


def test_padded_batches_and_beams_go_through():
    model = build_model(CONFIGS["gemma3"](eos_token_id=None), seed=2)
    prompts = [[5, 6, 7], list(range(40, 60))]
    for kind in ("fp8", "int8"):
        alone = [generate(model, [p], QuantizedKVCache(model, kind), 12)[0] for p in prompts]
        assert generate(model, prompts, QuantizedKVCache(model, kind), 12) == alone
    for kind in ("int8", "int4"):
        cache = QuantizedKVCache(model, KVCacheConfig(kind, page_size=16, recent_window=4))
        beams = generate(model, [prompts[1]], cache, 20, num_beams=3)
        assert len(beams[0]) == 20


def test_it_takes_less_memory():
    model = build_model(CONFIGS["llama"](head_dim=64, eos_token_id=None))
    prompt = [n % 90 for n in range(200)]
    sizes = {}
    for kind in ("auto", "fp8", "int8", "int4"):
        cache = QuantizedKVCache(model, KVCacheConfig(kind, recent_window=8))
        generate(model, [prompt], cache, 2)
        sizes[kind] = cache.num_bytes
    assert sizes["auto"] == 3 * 201 * 2 * 64 * 2 * 4
    assert sizes["fp8"] == sizes["auto"] / 4
    assert sizes["int8"] == sizes["auto"] * (64 + 4) / (64 * 4)
    pages, rest = 192, 9
    assert sizes["int4"] == sizes["auto"] * (rest + pages * (40 / 128) / 2) / 201
    cache.reset()
    assert (cache.num_bytes, cache.get_seq_length()) == (0, 0)


def test_another_16_bit_type_is_refused():
    model = build_model(CONFIGS["llama"]())
    with pytest.raises(BadInputError, match="own element type"):
        QuantizedKVCache(model, "bf16")
