"""A Llama with random weights, of a size that memory and time can be shown on.

The shapes are TinyLlama's (Zhang et al. 2024, https://arxiv.org/abs/2401.02385): 1.1 billion
parameters. Written shard by shard, so that never more than one block is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmopt.checkpoint.artifact import check_output, check_space
from llmopt.checkpoint.durable import storage_errors
from llmopt.checkpoint.shards import shard_file_name, write_index, write_shard
from llmopt.demo.paths import demo_model_path
from llmopt.demo.tokenizer import END_OF_TEXT_ID, save_tokenizer

STANDARD_DEVIATION = 0.02


def random_llama_config() -> LlamaConfig:
    """1.1 billion parameters; the demo model's tokenizer uses the first 4,096 of its entries."""
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=None,
        dtype="bfloat16",
    )


def write_random_llama(folder: Path, config: LlamaConfig | None = None, seed: int = 0) -> None:
    """Write a checkpoint in bfloat16 with its tokenizer.

    Args:
        folder: absent or empty.
        config: the architecture; that of 1.1 billion parameters if None.
        seed: of the weights.

    Raises:
        BadInputError: the folder holds something.
        StorageError: the disk is too small, or refuses.
    """
    config = config or random_llama_config()
    check_output(folder)
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in LlamaForCausalLM(config).named_parameters()
        }
    check_space(folder, 2 * sum(shape.numel() for shape in shapes.values()))
    with storage_errors(f"cannot make {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    parts = list(_parts(shapes, int(config.num_hidden_layers)))
    generator = torch.Generator().manual_seed(seed)
    records = []
    for index, names in enumerate(parts):
        tensors = {name: _weight(shapes[name], generator) for name in names}
        records.append(write_shard(folder / shard_file_name(index, len(parts)), tensors))
    write_index(folder, records)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))
    save_tokenizer(tokenizer, folder, int(config.max_position_embeddings))


def _parts(shapes: dict[str, torch.Size], num_blocks: int) -> Iterator[list[str]]:
    """Names by shard: each block, then what stands outside the blocks, tensor by tensor."""
    prefixes = [f"model.layers.{block}." for block in range(num_blocks)]
    for prefix in prefixes:
        yield [name for name in shapes if name.startswith(prefix)]
    yield from ([name] for name in shapes if not name.startswith(tuple(prefixes)))


def _weight(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Normal numbers; a norm's weight lies around one."""
    weight = torch.randn(shape, generator=generator).mul_(STANDARD_DEVIATION)
    return (weight + 1 if len(shape) == 1 else weight).to(torch.bfloat16)
