"""What every launcher does before it launches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llmopt_kernels import kv_cache_write, linear_fp8, norm_quantize, silu_mul_quantize
from llmopt_kernels.fp8_weight import Fp8Weight
from llmopt_kernels.launching import check_launchable, compiling, fp8_refusal, runs_kernel
from llmopt_kernels.paged_kv import new_cache
from llmopt_kernels.quantize_rows import launch_quantize_by, quantize_rows

FP8 = torch.float8_e4m3fn


def gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def write_fp8_cache() -> None:
    cache = new_cache("fp8", 3, 16, 2, 64, device="cuda")
    kv_cache_write(gpu(4, 2, 64), gpu(4, 2, 64), gpu(4, dtype=torch.int64), cache)


def quantize_by_one_scale() -> None:
    launch_quantize_by(gpu(3, 64), gpu(1, dtype=torch.float32), FP8)


def multiply_by_fp8() -> None:
    linear_fp8(gpu(3, 64), Fp8Weight(gpu(8, 64, dtype=FP8), gpu(1, dtype=torch.float32)))


def test_a_kernel_is_not_launched_on_a_cpu_outside_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="call the operation itself"):
        check_launchable(x=torch.zeros(1))
    with pytest.raises(ValueError, match="x on cpu, y on meta"):
        check_launchable(x=torch.zeros(1), y=torch.zeros(1, device="meta"))


def test_fp8_needs_a_chip_that_has_it() -> None:
    assert fp8_refusal((8, 9)) is None and fp8_refusal((9, 0)) is None
    assert "8.0, and fp8 needs 8.9" in (fp8_refusal((8, 0)) or "")


def test_only_a_gpu_takes_the_kernel() -> None:
    meta = torch.zeros(1, device="meta")
    assert not runs_kernel(torch.zeros(1)) and not runs_kernel(meta)
    with compiling():
        assert runs_kernel(meta)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("dtype", lambda: quantize_rows(gpu(3, 64), FP8)),
        ("dtype", lambda: quantize_rows(gpu(3, 256), FP8, 128)),
        ("dtype", quantize_by_one_scale),
        ("dtype", lambda: norm_quantize(gpu(3, 64), gpu(64), dtype=FP8)),
        ("dtype", lambda: silu_mul_quantize(gpu(3, 64), dtype=FP8)),
        ("cache.k", write_fp8_cache),
        ("codes", multiply_by_fp8),
    ],
)
def test_fp8_goes_neither_into_nor_out_of_a_chip_without_it(
    name: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    refusal = f"{name} is float8_e4m3fn: this GPU has compute capability 8.6, and fp8 needs 8.9"
    with FakeTensorMode(), pytest.raises(ValueError, match=refusal):
        call()
