"""The operations of llmopt_kernels, called for a step, say what the attention on a CPU says."""

import pytest
import torch
from decoding.attention.test_cpu import LENGTHS, SCALE, SCALES, attend, tensors
from decoding.slow_attention import slow_attention

from llmopt.decoding.attention.kernels import KernelAttention, plan_step
from llmopt.decoding.kv_cache_config import KVCacheConfig


def by_kernels(store, step):
    return KernelAttention(store, plan_step(step.chunks, store))


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"window": 9, "softcap": 1.5}], ids=str)
@pytest.mark.parametrize("kind", ["auto", "fp8", "int8", "int4"])
def test_every_kind_reads_what_its_definition_says(kind, options):
    scales = {0: SCALES} if kind == "fp8" else None
    config = KVCacheConfig(kind, page_size=16, recent_window=20, fp8_scales=scales)
    problems = [
        tuple(x.bfloat16() for x in tensors(length, seed, 64))
        for seed, length in enumerate(LENGTHS)
    ]
    given = {"k_scale": SCALES.k, "v_scale": SCALES.v} if kind == "fp8" else {}
    scale = SCALE / 4
    expected = [
        slow_attention(*p, kind=kind, recent=20, scale=scale, **options, **given)
        for p in ([x.double() for x in problem] for problem in problems)
    ]
    for chunk, shuffled in [(1, False), (7, True), (200, False)]:
        outs, _, _ = attend(
            config, problems, chunk, shuffled=shuffled, attention=by_kernels, scale=scale, **options
        )
        for got, want in zip(outs, expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)
