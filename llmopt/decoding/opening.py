"""From what a user calls a model to a model, its tokenizer and what ends its answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmopt.calibration.tokenizer import TOKENIZER_FILES, load_tokenizer
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.environment import check_device
from llmopt.errors import BadInputError
from llmopt.formats.config_file import quantization_config
from llmopt.loading import load, load_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ModelSource = "str | Path | PreTrainedModel"


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model to be served.

    Attributes:
        model: in evaluation mode.
        tokenizer: ``None`` where there is none; then prompts are token ids.
        eos_token_ids: what ends an answer.
        vocabulary_size: token ids are below it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    eos_token_ids: frozenset[int]
    vocabulary_size: int


def open_model(
    source: str | Path | PreTrainedModel,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
) -> OpenedModel:
    """Open a model for decoding.

    Args:
        source: a directory, of a Hugging Face checkpoint or of what llmopt quantized, or a model.
        tokenizer: of the model, or its directory; ``None`` takes the model directory's, if any.
        dtype: of a directory's model, or its name; ``None`` is the checkpoint's own.
        device: of a directory's model; ``None`` is the CPU.

    Raises:
        BadInputError: nothing that can be opened, or a dtype or device beside a loaded model.
    """
    if isinstance(source, str | Path):
        model = _load(Path(source), _dtype(dtype), check_device(str(device or "cpu")))
        if tokenizer is None and any((Path(source) / name).is_file() for name in TOKENIZER_FILES):
            tokenizer = source
    else:
        for name, value in (("dtype", dtype), ("device", device)):
            if value is not None:
                raise BadInputError(
                    f"{name} {value} is given beside a model that is loaded already",
                    f"leave it out; move the model itself by model.to({value!r})",
                )
        if not hasattr(source, "get_input_embeddings"):
            raise BadInputError(
                f"{type(source).__name__} is no model", "give a directory or a PreTrainedModel"
            )
        model = source
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(Path(tokenizer)).tokenizer
    embedding: Any = model.get_input_embeddings()
    return OpenedModel(
        model=model.train(False),
        tokenizer=tokenizer,
        eos_token_ids=frozenset(_eos_token_ids(model)),
        vocabulary_size=embedding.weight.shape[0],
    )


def _load(path: Path, dtype: torch.dtype | None, device: str) -> PreTrainedModel:
    if path.suffix == ".gguf":
        raise BadInputError(f"{path} is a GGUF file, which llama.cpp runs", f"llmopt serve {path}")
    if quantization_config(open_checkpoint(path)) is None:
        return load_dense(path, device=device, dtype=dtype)
    return load(path, device=device, dtype=dtype)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype):
        raise BadInputError(
            f"dtype {dtype!r} is not known", "use 'float32', 'bfloat16' or 'float16'"
        )
    return named


def _eos_token_ids(model: PreTrainedModel) -> Iterator[int]:
    """Both configs', each one id or several: chat models name the end of a turn in either."""
    text_config = model.config.get_text_config()
    for config in (getattr(model, "generation_config", None), model.config, text_config):
        named = getattr(config, "eos_token_id", None)
        yield from [] if named is None else [named] if isinstance(named, int) else named
