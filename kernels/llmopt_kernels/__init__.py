"""Kernels: one file an operation, its reference in torch first. Imports torch and triton alone.

``llmopt_kernels.OP(...)`` runs the kernel on a GPU and the reference on a CPU.
"""

from llmopt_kernels.attention_decode import attention_decode
from llmopt_kernels.attention_prefill import attention_prefill, attention_prefill_paged
from llmopt_kernels.gptq_columns import gptq_columns
from llmopt_kernels.kv_cache_write import kv_cache_write
from llmopt_kernels.kv_page_quantize import kv_page_quantize
from llmopt_kernels.linear_fp8 import linear_fp8
from llmopt_kernels.linear_w4a16 import linear_w4a16
from llmopt_kernels.norm_quantize import norm_quantize
from llmopt_kernels.quantize_rows import quantize_rows
from llmopt_kernels.rope import rope
from llmopt_kernels.silu_mul_quantize import silu_mul_quantize

__all__ = [
    "attention_decode",
    "attention_prefill",
    "attention_prefill_paged",
    "gptq_columns",
    "kv_cache_write",
    "kv_page_quantize",
    "linear_fp8",
    "linear_w4a16",
    "norm_quantize",
    "quantize_rows",
    "rope",
    "silu_mul_quantize",
]
