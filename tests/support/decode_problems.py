"""Problems of attention_decode, and how a result is held to its reference."""

import math

import torch
from support.comparing import TOLERANCE, relative_error
from support.paged_stores import filled_store, moved

from llmopt_kernels.attention_decode import (
    attention_decode_reference,
    launch_attention_decode,
)
from llmopt_kernels.attention_decode_config import DecodeConfig
from llmopt_kernels.decode_problem import DecodeProblem, pack_tree_mask

# Probabilities are rounded to 16 bit before they multiply the values, int4 is when dequantized.
LOOSER = 1.5
CONFIG = DecodeConfig(32, 4, 2)


def problem(
    lengths=(1, 17, 40, 0),
    kind="16-bit",
    page_size=16,
    q_heads=2,
    kv_heads=1,
    head_dim=64,
    dtype=torch.bfloat16,
    num_queries=1,
    device="cpu",
    recent=None,
    sinks=False,
    tree=False,
    interleaved=False,
    seed=0,
    **options,
):
    generator = torch.Generator().manual_seed(seed)
    shape = (page_size, kv_heads, head_dim)
    stores = [filled_store(kind, lengths, *shape, generator, dtype, interleaved)]
    if recent is not None:
        stores.append(filled_store("16-bit", recent, *shape, generator, dtype))
    num_tokens = len(lengths) * num_queries
    # Heads are cut out of a wider row, as q is out of a fused projection.
    q = torch.randn(num_tokens, q_heads + 2, head_dim, generator=generator).to(dtype)
    made = DecodeProblem(
        q[:, 1:-1],
        tuple(stores),
        num_queries,
        max(lengths),
        head_dim**-0.5,
        random_trees(len(lengths), num_queries, generator) if tree else None,
        sinks=torch.randn(q_heads, generator=generator) if sinks else None,
        **options,
    )
    return moved(made, device)


def random_trees(num_sequences, num_queries, generator):
    """Each token hangs on an earlier one, or on the sequence itself."""
    mask = torch.zeros(num_sequences, num_queries, num_queries, dtype=torch.bool)
    for tree in mask:
        for token in range(num_queries):
            parent = int(torch.randint(-1, token, (1,), generator=generator)) if token else -1
            if parent >= 0:
                tree[token] = tree[parent]
            tree[token, token] = True
    return pack_tree_mask(mask)


def hold(made, num_splits=2, config=CONFIG):
    expected, expected_lse = attention_decode_reference(made)
    out, lse = launch_attention_decode(made, num_splits, config)
    tolerance = LOOSER * TOLERANCE[made.q.dtype]
    assert out.dtype == made.q.dtype and out.shape == made.q.shape
    assert relative_error(out, expected) <= tolerance
    nothing = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, nothing)
    assert relative_error(lse[~nothing], expected_lse[~nothing]) <= tolerance
    return out, lse
