"""The list of planted faults, in the order of the table."""

from __future__ import annotations

from planted_faults.faults import (
    BLOCKS,
    LINEARS,
    Base,
    Fault,
    copy_norm,
    interleaved,
    module,
    remove_bias,
    reorder_heads,
    rolled,
    round_to_two_bits,
    shift_codes,
    shift_scales,
    shift_zero_points,
    swap_nibbles,
    zero_bias,
)

SYMMETRIC: Base = "int4-gptq"
ASYMMETRIC: Base = "int4-gptq asymmetric"
BIASED: Base = "int4-gptq with biases"

Q, K, V, UP, DOWN = (module(1, LINEARS[index]) for index in (0, 1, 2, 5, 6))
BLOCK = tuple(module(1, linear) for linear in LINEARS)
EVERYWHERE = tuple(module(block, linear) for block in BLOCKS for linear in LINEARS)
ALL_QK = tuple(module(block, linear) for block in BLOCKS for linear in LINEARS[:2])
ALL_BIASES = tuple(module(block, linear) for block in BLOCKS for linear in LINEARS[:3])

FAULTS = (
    Fault("swapped nibbles, one up_proj", SYMMETRIC, "packing", swap_nibbles(UP)),
    Fault("swapped nibbles, one k_proj", SYMMETRIC, "packing", swap_nibbles(K)),
    Fault("swapped nibbles, every layer", SYMMETRIC, "packing", swap_nibbles(*EVERYWHERE)),
    Fault(
        "zero point + 1, one k_proj",
        SYMMETRIC,
        "packing",
        shift_codes(-1, K),
        verdict="small",
    ),
    Fault("zero point + 1, one v_proj", SYMMETRIC, "packing", shift_codes(-1, V)),
    Fault(
        "zero point - 1, one down_proj",
        SYMMETRIC,
        "packing",
        shift_codes(+1, DOWN),
        verdict="small",
    ),
    Fault("zero point + 1, one block", SYMMETRIC, "packing", shift_codes(-1, *BLOCK)),
    Fault("zero point - 1, one block", SYMMETRIC, "packing", shift_codes(+1, *BLOCK)),
    Fault(
        "stored zero point + 1, one up_proj",
        ASYMMETRIC,
        "packing",
        shift_zero_points(+1, UP),
        verdict="small",
    ),
    Fault(
        "stored zero point - 1, one v_proj",
        ASYMMETRIC,
        "packing",
        shift_zero_points(-1, V),
    ),
    Fault("stored zero point + 1, one block", ASYMMETRIC, "packing", shift_zero_points(+1, *BLOCK)),
    Fault("stored zero point - 1, one block", ASYMMETRIC, "packing", shift_zero_points(-1, *BLOCK)),
    Fault("one block at two bits", SYMMETRIC, "solving", round_to_two_bits(*BLOCK)),
    Fault("one k_proj at two bits", SYMMETRIC, "solving", round_to_two_bits(K)),
    Fault("one q_proj rolled by a head", SYMMETRIC, "solving", reorder_heads(rolled, Q)),
    Fault("one q_proj unpermuted", SYMMETRIC, "solving", reorder_heads(interleaved, Q)),
    Fault("one q/k pair unpermuted", SYMMETRIC, "solving", reorder_heads(interleaved, Q, K)),
    Fault("every q/k unpermuted", SYMMETRIC, "solving", reorder_heads(interleaved, *ALL_QK)),
    Fault("k/v heads swapped, one block", SYMMETRIC, "solving", reorder_heads(rolled, K, V)),
    Fault("v heads swapped, one block", SYMMETRIC, "solving", reorder_heads(rolled, V)),
    Fault(
        "scales one group off, one up_proj",
        SYMMETRIC,
        "packing",
        shift_scales(UP),
        verdict="small",
    ),
    Fault(
        "scales one group off, one down_proj",
        SYMMETRIC,
        "packing",
        shift_scales(DOWN),
        verdict="small",
    ),
    Fault("scales one group off, every layer", SYMMETRIC, "packing", shift_scales(*EVERYWHERE)),
    Fault(
        "input norm of the block below",
        SYMMETRIC,
        "copying",
        copy_norm(1, 2, "input_layernorm"),
        verdict="small",
    ),
    Fault(
        "MLP norm of the block below",
        SYMMETRIC,
        "copying",
        copy_norm(1, 2, "post_attention_layernorm"),
    ),
    Fault("one v_proj's bias at zero", BIASED, "copying", zero_bias(V)),
    Fault("every q/k/v bias at zero", BIASED, "copying", zero_bias(*ALL_BIASES)),
    Fault("one v_proj's bias not written", BIASED, "copying", remove_bias(V), verdict="not opened"),
)
