"""Packed experts, opened by transformers; what it cannot open is refused by the table."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_models import mixtral_config, qwen3_moe_config, write_checkpoint
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import read_structure
from llmopt.formats.compressed_tensors import CompressedTensors
from llmopt.formats.consumers import load_consumers
from llmopt.loading import load
from llmopt.naming import config_names, ignored_names
from llmopt.quantization.rtn import rtn
from llmopt.quantization.scheme import Scheme

WIDTHS = {"num_hidden_layers": 2, "mlp_only_layers": [], "intermediate_size": 64}
WIDTHS |= {"moe_intermediate_size": 64}
TOKENS = torch.arange(30).view(2, 15) * 7 % 97
W4, W8 = Scheme(4, 32), Scheme(8, 32)


def write_mixture(folder: Path, config, scheme_of) -> torch.Tensor:
    """Write it packed, in float32 for exactness; return the logits of the dequantized weights."""
    write_checkpoint(folder / "source", config)
    reader = open_checkpoint(folder / "source")
    structure, form = read_structure(reader), CompressedTensors()
    packed = {name: reader.read(name).clone() for name in reader.names}
    meant, schemes, kept = dict(packed), {}, []
    for block in range(structure.num_blocks):
        for linear in structure.linear_names(block):
            memory = f"{structure.block_prefix(block)}.{linear}"
            scheme = scheme_of(memory)
            if scheme is None:
                kept.append(memory)
                continue
            module = structure.disk_module(memory)
            quantized = rtn(packed.pop(f"{module}.weight"), scheme, scale_dtype=torch.float32)
            packed |= form.pack(module, quantized)
            meant[f"{module}.weight"] = quantized.dequantize()
            schemes[memory] = scheme
    content = json.loads((folder / "source" / "config.json").read_text())
    ignored = ignored_names(reader, structure, kept)
    section = form.config(config_names(structure, schemes), ignored)
    for name, tensors, extra in (
        ("packed", packed, {"quantization_config": section}),
        ("meant", meant, {}),
    ):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(content | extra))
    return logits(AutoModelForCausalLM.from_pretrained(folder / "meant").eval())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def open_packed(folder: Path, **options: object) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(AutoModelForCausalLM.from_pretrained(folder / "packed", **options))


@pytest.mark.parametrize(
    ("config", "scheme"),
    [(mixtral_config(**WIDTHS), W4), (qwen3_moe_config(**WIDTHS), Scheme(3, None))],
    ids=["mixtral", "qwen3_moe"],
)
def test_transformers_and_our_loader_give_the_logits_of_our_dequantized_weights(
    config, scheme, tmp_path
):
    expected = write_mixture(tmp_path, config, lambda _: scheme)
    assert torch.equal(open_packed(tmp_path), expected)
    dequantizing = CompressedTensorsConfig(dequantize=True)
    assert torch.equal(open_packed(tmp_path, quantization_config=dequantizing), expected)
    ours = load(tmp_path / "packed")
    torch.testing.assert_close(logits(ours), expected, atol=1e-4, rtol=1e-4)
    assert ours.generate(TOKENS, max_new_tokens=2, do_sample=False).shape == (2, 17)


@pytest.mark.parametrize(
    ("scheme_of", "blocks", "others"),
    [
        (lambda _: replace(W4, symmetric=False), [{replace(W4, symmetric=False)}] * 2, []),
        (lambda name: None if "experts.1" in name else W4, [{W4, None}] * 2, [W4]),
        (lambda name: None if "experts" in name else W4, [{None}] * 2, [W4]),
    ],
    ids=["asymmetric", "one expert in 16 bit", "all experts in 16 bit"],
)
def test_what_transformers_cannot_open_the_table_refuses(scheme_of, blocks, others, tmp_path):
    write_mixture(tmp_path, mixtral_config(**WIDTHS), scheme_of)
    with pytest.raises(RuntimeError):
        open_packed(tmp_path)
    support = load_consumers()["transformers"].formats["compressed-tensors"]
    assert support.expert_refusals(blocks, others)


def test_what_transformers_reads_wrongly_the_table_refuses(tmp_path):
    expected = write_mixture(
        tmp_path, mixtral_config(**WIDTHS), lambda name: W8 if "self_attn" in name else W4
    )
    assert (open_packed(tmp_path) - expected).abs().max() > 1  # and says nothing
    support = load_consumers()["transformers"].formats["compressed-tensors"]
    assert support.expert_refusals([{W4}], [W8])
