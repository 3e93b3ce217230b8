"""The text model of a checkpoint on the meta device, and where its parts are, by structure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmopt.checkpoint.experts import split_experts
from llmopt.checkpoint.shell import BodyRecord, BodyShell, TokenBatch
from llmopt.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_UNKNOWN = (
    "llmopt takes decoder-only language models that transformers knows (Llama, Mistral, Mixtral, "
    "Qwen2, Qwen3, Phi-3, OLMo 2, SmolLM3, Gemma 2 and 3 and their like); check model_type and "
    "architectures in config.json, or upgrade transformers if the architecture is newer than it"
)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Memory names of a causal language model's parts."""

    body: str
    blocks: str
    embedding: str
    head: str
    final_norm: str


def read_configs(config: Mapping[str, Any]) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """Parse `config.json` into (full config, text model's config).

    Raises:
        BadInputError: unknown architecture, or values that transformers refuses.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise BadInputError(f"unknown architecture: {_described(config)}", _UNKNOWN)
    try:
        full = CONFIG_MAPPING[model_type].from_dict(dict(config))
        text = copy.deepcopy(full.get_text_config(decoder=True))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInputError(
            f"config.json of {_described(config)} cannot be read: {error}", "repair config.json"
        ) from error
    # The class that owns lm_head decides about tying: of a multimodal wrapper, the wrapper.
    text.tie_word_embeddings = getattr(full, "tie_word_embeddings", text.tie_word_embeddings)
    return full, text


def build_skeleton(config: Mapping[str, Any], text: PreTrainedConfig) -> PreTrainedModel:
    """Build the causal language model of `text` on the meta device, in float32, for inference.

    A mixture's experts are linear layers in it (:class:`LinearExperts`).

    Raises:
        BadInputError: transformers has no causal language model for it, or experts are fused in
            a layout that llmopt does not know.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BadInputError(f"no causal language model: {_described(config)}", _UNKNOWN)
    try:
        with torch.device("meta"):
            skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]  # transformers'
                text, dtype=torch.float32
            )
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise BadInputError(
            f"transformers cannot build {_described(config)}: {error}", "repair config.json"
        ) from error
    nn.Module.requires_grad_(nn.Module.eval(skeleton), False)
    split_experts(skeleton)
    return skeleton


def find_anatomy(skeleton: PreTrainedModel) -> tuple[Anatomy, BodyRecord]:
    """Find blocks, embedding, head and final norm; run the body once on zeros.

    Returns:
        The anatomy, and the record of a run over 5 tokens on the CPU in float32.

    Raises:
        BadInputError: not a chain of decoder blocks between an embedding and one final norm.
    """
    names = {id(module): name for name, module in skeleton.named_modules()}
    embedding = skeleton.get_input_embeddings()
    head = skeleton.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers'
    blocks = _find_blocks(skeleton)
    if blocks is None or not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise _not_a_chain(skeleton, "no list of decoder blocks, embedding or linear head found")
    body = blocks.rpartition(".")[0]
    embedding_name = names[id(embedding)]
    if embedding_name.rpartition(".")[0] != body or body != skeleton.base_model_prefix:
        raise _not_a_chain(skeleton, f"{embedding_name} and {blocks} are not the body's own")
    parameters = skeleton.state_dict()
    hidden_size = embedding.weight.shape[1]
    shell = BodyShell(
        skeleton,
        body,
        blocks,
        embedding_name,
        (),
        read_parameter=lambda name: torch.zeros(parameters[name].shape),
        read_rows=lambda ids: torch.zeros(len(ids), hidden_size),
        device="cpu",
        dtype=torch.float32,
    )
    norm, record = _find_final_norm(skeleton, shell)
    return Anatomy(body, blocks, embedding_name, names[id(head)], f"{body}.{norm}"), record


def _find_blocks(skeleton: nn.Module) -> str | None:
    """The shallowest list of as many modules as the config has layers, each with linear layers."""
    count = getattr(skeleton.config, "num_hidden_layers", None)
    lists = [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(any(isinstance(m, nn.Linear) for m in block.modules()) for block in module)
    ]
    return min(lists, key=lambda name: name.count("."), default=None)


def _find_final_norm(skeleton: PreTrainedModel, shell: BodyShell) -> tuple[str, BodyRecord]:
    """The one child of the body between the last block and the body's output."""
    inputs: dict[str, tuple[Tensor, Tensor]] = {}
    returned: list[Tensor] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                inputs[name] = (args[0], output)

        return hook

    handles = [
        child.register_forward_hook(note(name)) for name, child in shell.body.named_children()
    ]
    handles.append(
        shell.recorders[-1].register_forward_hook(lambda _, __, output: returned.append(output))
    )
    try:
        record = shell.run(TokenBatch(torch.zeros(1, 5, dtype=torch.int64)))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise _not_a_chain(skeleton, str(error)) from error
    finally:
        for handle in handles:
            handle.remove()
    after = [name for name, (given, _) in inputs.items() if given is returned[-1]]
    if len(record.calls) != len(shell.recorders) or len(after) != 1:
        raise _not_a_chain(
            skeleton,
            f"{len(record.calls)} of {len(shell.recorders)} blocks called, "
            f"{len(after)} modules after the last",
        )
    return after[0], record


def _not_a_chain(skeleton: nn.Module, why: str) -> BadInputError:
    return BadInputError(
        f"{type(skeleton).__name__} is not a plain chain of decoder blocks: {why}", _UNKNOWN
    )


def _described(config: Mapping[str, Any]) -> str:
    return f"model_type {config.get('model_type')!r}, architectures {config.get('architectures')!r}"
