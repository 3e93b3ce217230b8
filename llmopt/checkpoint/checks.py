"""What is refused about a checkpoint directory before a tensor of it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from pydantic import JsonValue

from llmopt.errors import BadInputError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})

_COMPLETE = "download the checkpoint again, completely"


def read_json_object(path: Path) -> dict[str, JsonValue]:
    """A JSON file whose top level is an object.

    Raises:
        BadInputError: if it cannot be read or is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(
            f"cannot read {path}: {error.strerror}", "check the path and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is not JSON: {error}", _COMPLETE) from error
    if not isinstance(value, dict):
        raise BadInputError(f"{path} is not a JSON object", _COMPLETE)
    return value


def check_config(path: Path) -> dict[str, JsonValue]:
    """The directory's ``config.json``.

    Raises:
        BadInputError: if there is none, or the model or its tokenizer needs remote code. A model
            that transformers holds itself does not, even where ``auto_map`` offers some.
    """
    if not path.is_dir():
        what = "is a file, not a checkpoint directory" if path.exists() else "does not exist"
        raise BadInputError(f"{path} {what}", "give the directory that holds config.json")
    if not (path / "config.json").exists():
        if (path / "adapter_config.json").exists():
            raise BadInputError(
                f"{path} holds an adapter, not a model",
                "merge it into its base model first (peft: merge_and_unload)",
            )
        raise BadInputError(f"{path} has no config.json", "give a Hugging Face checkpoint")
    config = read_json_object(path / "config.json")
    configs = {"config.json": config}
    if (path / "tokenizer_config.json").exists():
        configs["tokenizer_config.json"] = read_json_object(path / "tokenizer_config.json")
    for name, content in configs.items():
        if content.get("auto_map") and not (content is config and _transformers_has(config)):
            raise BadInputError(
                f"{path / name} asks for remote code (auto_map)",
                "llmopt runs no code from a checkpoint; use a model that transformers holds "
                "itself, and if this is one, remove auto_map",
            )
    return config


def _transformers_has(config: Mapping[str, JsonValue]) -> bool:
    """Whether the code on offer is a model that transformers holds itself, by the very same name.

    So with Phi-3, which was published before transformers took it up.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    offered = config.get("auto_map")
    if own is None or config.get("architectures") != [own] or not isinstance(offered, dict):
        return False
    return str(offered.get("AutoModelForCausalLM")).rpartition(".")[2] == own


def find_shards(path: Path) -> tuple[str, ...]:
    """File names of the shards that make up the checkpoint; files no index names are not of it.

    Raises:
        BadInputError: if there are no safetensors, not all of them, or two sets.
    """
    index_path = path / INDEX_FILE
    if index_path.exists():
        names = sorted(set(_weight_map(index_path, read_json_object(index_path)).values()))
        if (path / SINGLE_FILE).exists() and SINGLE_FILE not in names:
            raise BadInputError(
                f"{path} holds two checkpoints: {SINGLE_FILE} and the shards of {INDEX_FILE}",
                "remove the one that is not meant",
            )
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise BadInputError(
                f"{path}: {len(missing)} of {len(names)} shards that {INDEX_FILE} names are "
                f"missing: {_some(missing)}",
                "download the missing shards",
            )
        return tuple(names)
    if (path / SINGLE_FILE).is_file():
        return (SINGLE_FILE,)
    others = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
    safetensors = [name for name in others if name.endswith(".safetensors")]
    if len(safetensors) == 1 and "quantize_config.json" in others:
        return (safetensors[0],)  # auto-gptq's own name: gptq_model-4bit-128g.safetensors
    if safetensors:
        raise BadInputError(
            f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}, only {_some(safetensors)}",
            f"download {INDEX_FILE} too, or rename a single file to {SINGLE_FILE}",
        )
    pickles = [name for name in others if Path(name).suffix in PICKLE_SUFFIXES]
    if pickles:
        raise BadInputError(
            f"{path} holds pickled weights only ({_some(pickles)}); loading them can run code",
            "convert them where you trust them: AutoModelForCausalLM.from_pretrained(DIR)"
            ".save_pretrained(NEW_DIR), then give NEW_DIR",
        )
    raise BadInputError(
        f"{path} holds no safetensors weights", "give a checkpoint whose weights are safetensors"
    )


def check_index(
    index_path: Path, index: Mapping[str, JsonValue] | None, held: Mapping[str, Sequence[str]]
) -> None:
    """Holds that each tensor is in one shard and in the one the index names.

    Args:
        index_path: for the messages.
        index: the content of ``model.safetensors.index.json``, or none.
        held: names of the tensors in each shard.

    Raises:
        BadInputError: naming tensors that are absent, unnamed, elsewhere or in two shards.
    """
    found: dict[str, str] = {}
    twice: list[str] = []
    for file, names in held.items():
        for name in names:
            if name in found:
                twice.append(f"{name} ({found[name]}, {file})")
            found[name] = file
    if twice:
        raise BadInputError(
            f"{index_path.parent}: tensors in two shards: {_some(twice)}", _COMPLETE
        )
    if index is None:
        return
    mapped = _weight_map(index_path, index)
    problems = {
        "names tensors that no shard holds": [name for name in mapped if name not in found],
        "names another shard than the one that holds them": [
            f"{name} ({mapped[name]}, found in {found[name]})"
            for name in mapped
            if name in found and found[name] != mapped[name]
        ],
        "lacks tensors that its shards hold": [name for name in found if name not in mapped],
    }
    wrong = [f"{what}: {_some(names)}" for what, names in problems.items() if names]
    if wrong:
        raise BadInputError(f"{index_path} {'; it '.join(wrong)}", _COMPLETE)


def _weight_map(index_path: Path, index: Mapping[str, JsonValue]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInputError(f"{index_path} has no weight_map", _COMPLETE)
    files: dict[str, str] = {}
    for name, file in weight_map.items():
        # A shard lies beside its index; anything else could point out of the directory.
        if not isinstance(file, str) or file in {"", ".", ".."} or PurePosixPath(file).name != file:
            raise BadInputError(
                f"{index_path} places {name!r} in {file!r}, which is no file beside it", _COMPLETE
            )
        files[name] = file
    return files


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
