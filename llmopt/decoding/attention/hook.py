"""Our attention function inside a transformers model, and what its layers say when they call it.

transformers looks an attention function up by the name in the config, and makes no mask for a name
that has no mask function. So every architecture whose layers ask for their attention in this way
is served, its window, soft cap and scale as it passes them. The name is in the config only while
one of our forwards runs: outside, the model is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llmopt.decoding.kv.layers import AttentionLayer
from llmopt.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "llmopt_paged"
REMEDY = "serve it by transformers, vLLM or llama.cpp"
# What layers pass that changes nothing here; any other option that is set is refused.
_NEUTRAL = frozenset({"position_ids", "use_cache", "return_dict", "is_causal"})


@dataclass(frozen=True, slots=True)
class Call:
    """One layer's attention.

    Attributes:
        layer: ``layer_idx`` of the module.
        q: ``(heads, tokens, head_dim)``, rotated.
        k: ``(kv_heads, tokens, head_dim)``, rotated.
        v: likewise.
        scale: of the scores.
        softcap: bound of the scores.
        sinks: ``(heads,)`` a logit of each head that joins the denominator.
        window: positions that a query sees.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None
    window: int | None


class Attends(Protocol):
    """What answers the layers of one forward."""

    def __call__(self, call: Call) -> Tensor:
        """The heads' outputs ``(tokens, heads, head_dim)``."""
        ...


_attends: ContextVar[Attends] = ContextVar("attends")


@dataclass(slots=True)
class _Lent:
    """A config that bears our name: how many forwards run by it, and what it goes back to."""

    num_forwards: int
    name: str


_lent: dict[int, _Lent] = {}  # by the id of the config, which its forwards keep alive
_lent_lock = Lock()


@contextmanager
def attending(configs: Sequence[Any], attends: Attends) -> Iterator[None]:
    """Inside, layers of the model whose ``configs`` these are ask ``attends``.

    Several threads may run one model so, each with its own ``attends``; the configs are as they
    were when the last of them leaves.
    """
    token = _attends.set(attends)
    for config in configs:
        _lend(config)
    try:
        yield
    finally:
        for config in configs:
            _take_back(config)
        _attends.reset(token)


def _lend(config: Any) -> None:
    with _lent_lock:
        lent = _lent.setdefault(id(config), _Lent(0, config._attn_implementation_internal))
        lent.num_forwards += 1
        config._attn_implementation_internal = NAME


def _take_back(config: Any) -> None:
    with _lent_lock:
        lent = _lent[id(config)]
        lent.num_forwards -= 1
        if not lent.num_forwards:
            config._attn_implementation_internal = lent.name
            del _lent[id(config)]


def configs_of(model: nn.Module) -> tuple[Any, ...]:
    """Every config that a module of the model looks its attention function up in."""
    register()
    found = {
        id(module.config): module.config
        for module in model.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal")
    }
    return tuple(found.values())


def find_layers(model: PreTrainedModel) -> tuple[AttentionLayer, ...]:
    """The model's attention layers, found by watching one token go through.

    Raises:
        BadInputError: layers that ask for their attention in another way, or for something that
            is not served; says what.
    """
    layers: dict[int, AttentionLayer] = {}

    def watch(call: Call) -> Tensor:
        (heads, tokens, head_dim), kv_heads = call.q.shape, call.k.shape[0]
        if call.v.shape[-1] != head_dim or call.layer in layers or heads % kv_heads:
            raise BadInputError(
                f"layer {call.layer} has {heads} heads of {head_dim} channels over {kv_heads} KV "
                f"heads whose values have {call.v.shape[-1]}, or shares another layer's cache",
                REMEDY,
            )
        layers[call.layer] = AttentionLayer(call.layer, heads, kv_heads, head_dim, call.window)
        return call.q.new_zeros(tokens, heads, head_dim)

    configs = configs_of(model)
    embedding: Any = model.get_input_embeddings()
    token = torch.zeros(1, 1, dtype=torch.long, device=embedding.weight.device)
    with torch.no_grad(), attending(configs, watch):
        model(input_ids=token, position_ids=token, use_cache=False, logits_to_keep=1)
    expected = model.config.get_text_config().num_hidden_layers
    if len(layers) != expected:
        raise BadInputError(
            f"{len(layers)} of the {expected} layers of {type(model).__name__} ask for an "
            "attention function by name; the others keep a state that is not served here",
            REMEDY,
        )
    return tuple(layers[index] for index in sorted(layers))


def register() -> None:
    """Make the function known to transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: ``(1, heads, tokens, head_dim)`` to ``(1, tokens, heads, ...)``."""
    if attention_mask is not None or dropout or query.shape[0] != 1 or _unknown(options):
        raise BadInputError(
            f"{type(module).__name__} asks for attention with {_asked(attention_mask, dropout)}"
            f"{', '.join(_unknown(options))}",
            REMEDY,
        )
    attends = _attends.get(None)
    if attends is None:
        raise BadInputError(
            f"{type(module).__name__} is called while an engine runs its model in another thread: "
            "for so long the model's attention is the engine's",
            "call the model when no request is in flight, or a copy.deepcopy of it",
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer: Any = module.layer_idx
    call = Call(layer, query[0], key[0], value[0], scale, softcap, s_aux, sliding_window)
    return attends(call)[None], None


def _unknown(options: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in options.items()
        if name not in _NEUTRAL and value is not None and value is not False
    ]


def _asked(attention_mask: Tensor | None, dropout: float) -> str:
    mask = "a mask of its own " if attention_mask is not None else ""
    return mask + (f"dropout {dropout} (call model.eval()) " if dropout else "")
