"""Triton's interpreter with bfloat16 and fp8 arithmetic put right.

The interpreter holds bfloat16 as the bit patterns in uint16 and computes with those, and rounds
conversions to bfloat16 and fp8 wrongly. Here such operands are widened to float32 for every
operation and results rounded as torch rounds. Not covered: bfloat16 atomics, scans, sorts, argmax
and custom reductions; kernels compute those in float32.

``install`` must be called before a kernel runs, with TRITON_INTERPRET=1 set before triton was
imported.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

TORCH = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


@cache
def install() -> None:
    """Replace the interpreter's conversions and arithmetic of bfloat16 and fp8, once."""
    plain_convert = interpreter._convert_float
    plain_dot, plain_cast = Builder.create_dot, Builder.cast_impl
    plain_sum = interpreter.ReduceOps.sum

    def convert(x: Any, source: Any, target: Any, mode: Any = None) -> Any:
        toward_zero = interpreter._ir.ROUNDING_MODE.RTZ
        if source not in TORCH or target not in TORCH or mode == toward_zero:
            return plain_convert(x, source, target, mode)
        width, new_width = source.primitive_bitwidth, target.primitive_bitwidth
        bits = torch.from_numpy(np.ascontiguousarray(x).view(f"i{width // 8}").copy())
        values = bits.view(TORCH[source])
        if new_width == 8:  # the hardware's conversion saturates
            limit = torch.finfo(TORCH[target]).max
            values = values.float().clamp(-limit, limit)
        codes = values.to(TORCH[target]).view(getattr(torch, f"int{new_width}"))
        return codes.numpy().view(f"u{new_width // 8}").reshape(np.shape(x))

    def is_bfloat16(handle: Any) -> bool:
        return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16

    def widen(handle: Any) -> Any:
        if not is_bfloat16(handle):
            return handle
        return Handle(convert(handle.data, tl.bfloat16, tl.float32).view("f4"), tl.float32)

    def narrow(handle: Any) -> Any:
        return Handle(convert(handle.data.astype("f4"), tl.float32, tl.bfloat16), tl.bfloat16)

    def in_float32(operation: Any) -> Any:
        def run(self: Any, *operands: Any) -> Any:
            result = operation(self, *map(widen, operands))
            wide = result.dtype.scalar == tl.float32 and result.data.dtype.kind == "f"
            return narrow(result) if wide and any(map(is_bfloat16, operands)) else result

        return run

    def cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16:
            return source if is_bfloat16(source) else narrow(source)
        return plain_cast(self, widen(source), target)

    def sum_(self: Any, x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return plain_sum(self, x)
        total = np.sum(widen(x.handle).data, axis=self.axis, keepdims=self.keep_dims)
        rounded = convert(np.asarray(total, "f4"), tl.float32, tl.bfloat16)
        return self.to_tensor(rounded, tl.bfloat16)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, widen(a), widen(b), *rest)

    def get_bf16(self: Any, value: float) -> Any:
        return narrow(Handle(np.array([value], "f4"), tl.float32))

    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(Builder, name, in_float32(getattr(Builder, name)))
    interpreter._convert_float = convert
    interpreter.ReduceOps.sum = sum_
    Builder.cast_impl = cast
    Builder.create_dot = dot
    Builder.get_bf16 = get_bf16
