"""What llama.cpp knows of each family of models, as data.

Sources: ``src/models/*.cpp`` (which tensors are loaded, which switches are read),
``src/llama-arch.cpp`` (names) and ``llama_model_rope_type`` of llama.cpp as in llama-cpp-python
0.3.36. Memory names are transformers'; ``*`` stands for the number of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_SILU = frozenset({"silu", "swish"})
_TANH_GELU = frozenset({"gelu_pytorch_tanh", "gelu_new"})

_INPUT_NORM = {"input_layernorm": "attn_norm"}
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_MLP_NORM = {"post_attention_layernorm": "ffn_norm"}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.*.gate_proj": "ffn_gate_exps",
    "mlp.experts.*.up_proj": "ffn_up_exps",
    "mlp.experts.*.down_proj": "ffn_down_exps",
}
_LATER_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GEMMA_NORMS = {**_LATER_NORMS, "pre_feedforward_layernorm": "ffn_norm"}


@dataclass(frozen=True, slots=True)
class Family:
    """Models that one graph of llama.cpp computes.

    Attributes:
        architecture: llama.cpp's name, which is the prefix of its metadata, too.
        model_types: Hugging Face's text models that it computes.
        model_class: the Hugging Face class that a file is read back as.
        block_names: module in a decoder block (memory name) -> tensor in ``blk.N``, in the order
            of the file.
        disk_names: module in a decoder block -> as checkpoints call it, where they differ.
        activations: of the MLP, by Hugging Face's names, that the graph computes.
        rope_types: rotary scalings that the loader reads.
        biases: tensors of a block whose bias is loaded.
        permuted: the graph rotates neighbours, so rows of q and k are permuted.
        added_to_norms: what the graph does not add to a norm's weight and the model does.
        has_windows: some blocks see a window only. Elsewhere the context is cut to the window.
        window_every: the default pattern: of so many blocks the last sees everything; 0 for none.
        partial_rotary: part of a head may be rotated.
        free_head_size: heads times their size need not be the hidden size.
        own_head: the file must have an ``output`` even if it is the embedding.
        tied_head: the embedding is the head, there is no ``output``.
        large_model_blocks: in a model of so many blocks attention is scaled by the hidden size
            over the heads, not by the head size (Gemma's 27B); 0 where there is no such rule.
        no_rope_every: of so many blocks the last rotates nothing; 0 for none.
    """

    architecture: str
    model_types: tuple[str, ...]
    model_class: str
    block_names: Mapping[str, str]
    disk_names: Mapping[str, str] = field(default_factory=dict)
    activations: frozenset[str] = _SILU
    rope_types: frozenset[str] = frozenset({"default", "linear", "yarn"})
    biases: frozenset[str] = frozenset()
    permuted: bool = False
    added_to_norms: float = 0.0
    has_windows: bool = False
    window_every: int = 0
    partial_rotary: bool = False
    free_head_size: bool = True
    own_head: bool = False
    tied_head: bool = False
    large_model_blocks: int = 0
    no_rope_every: int = 0

    @property
    def has_experts(self) -> bool:
        """Whether its MLP is a mixture of experts."""
        return any("*" in name for name in self.block_names)

    @property
    def rotary_tensors(self) -> tuple[str, ...]:
        """Tensors of the file, outside its blocks, that hold factors of the rotary frequencies."""
        names = {"llama3": ("rope_freqs",), "longrope": ("rope_factors_long", "rope_factors_short")}
        return tuple(
            name for kind in sorted(names) if kind in self.rope_types for name in names[kind]
        )


_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_FACTORS = frozenset({"default", "linear", "yarn", "llama3", "longrope"})

LLAMA = Family(
    architecture="llama",
    model_types=("llama", "mistral"),
    model_class="LlamaForCausalLM",
    block_names={**_INPUT_NORM, **_ATTENTION, **_MLP_NORM, **_MLP},
    rope_types=_FACTORS,
    biases=_QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"},
    permuted=True,
)
MIXTRAL = Family(
    architecture="llama",
    model_types=("mixtral",),
    model_class="MixtralForCausalLM",
    block_names={**_INPUT_NORM, **_ATTENTION, **_MLP_NORM, **_EXPERTS},
    disk_names={
        "mlp.gate": "block_sparse_moe.gate",
        "mlp.experts.*.gate_proj": "block_sparse_moe.experts.*.w1",
        "mlp.experts.*.up_proj": "block_sparse_moe.experts.*.w3",
        "mlp.experts.*.down_proj": "block_sparse_moe.experts.*.w2",
    },
    rope_types=_FACTORS,
    permuted=True,
)
QWEN2 = Family(
    architecture="qwen2",
    model_types=("qwen2",),
    model_class="Qwen2ForCausalLM",
    block_names={**_INPUT_NORM, **_ATTENTION, **_MLP_NORM, **_MLP},
    biases=_QKV,
    free_head_size=False,
)
QWEN3 = Family(
    architecture="qwen3",
    model_types=("qwen3",),
    model_class="Qwen3ForCausalLM",
    block_names={**_INPUT_NORM, **_ATTENTION, **_HEAD_NORMS, **_MLP_NORM, **_MLP},
)
QWEN3_MOE = Family(
    architecture="qwen3moe",
    model_types=("qwen3_moe",),
    model_class="Qwen3MoeForCausalLM",
    block_names={**_INPUT_NORM, **_ATTENTION, **_HEAD_NORMS, **_MLP_NORM, **_EXPERTS},
)
GEMMA2 = Family(
    architecture="gemma2",
    model_types=("gemma2",),
    model_class="Gemma2ForCausalLM",
    block_names={**_INPUT_NORM, **_ATTENTION, **_GEMMA_NORMS, **_MLP},
    activations=_TANH_GELU,
    rope_types=frozenset({"default", "linear"}),
    added_to_norms=1.0,
    has_windows=True,
    window_every=2,
    tied_head=True,
    large_model_blocks=46,
)
GEMMA3 = Family(
    architecture="gemma3",
    model_types=("gemma3_text",),
    model_class="Gemma3ForCausalLM",
    block_names={**_INPUT_NORM, **_ATTENTION, **_HEAD_NORMS, **_GEMMA_NORMS, **_MLP},
    activations=_TANH_GELU,
    rope_types=frozenset({"default", "linear"}),
    added_to_norms=1.0,
    has_windows=True,
    window_every=6,
    large_model_blocks=62,
)
PHI3 = Family(
    architecture="phi3",
    model_types=("phi3",),
    model_class="Phi3ForCausalLM",
    block_names={
        **_INPUT_NORM,
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        **_MLP_NORM,
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    rope_types=frozenset({"default", "longrope"}),
    partial_rotary=True,
    free_head_size=False,
)
OLMO2 = Family(
    architecture="olmo2",
    model_types=("olmo2",),
    model_class="Olmo2ForCausalLM",
    block_names={**_ATTENTION, **_HEAD_NORMS, **_LATER_NORMS, **_MLP},
    free_head_size=False,
    own_head=True,
)
SMOLLM3 = Family(
    architecture="smollm3",
    model_types=("smollm3",),
    model_class="SmolLM3ForCausalLM",
    block_names={**_INPUT_NORM, **_ATTENTION, **_MLP_NORM, **_MLP},
    permuted=True,
    no_rope_every=4,
)

FAMILIES = (
    LLAMA,
    MIXTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    GEMMA2,
    GEMMA3,
    PHI3,
    OLMO2,
    SMOLLM3,
)

SHARED_NAMES = {"embedding": "token_embd", "final_norm": "output_norm", "head": "output"}
"""The tensors outside the blocks: part of the anatomy -> name in the file."""
