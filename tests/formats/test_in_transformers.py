"""A tiny Llama in our format, opened by transformers and by DequantizedSource."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.errors import BadInputError
from llmopt.formats.compressed_tensors import CompressedTensors
from llmopt.formats.consumers import load_consumers
from llmopt.formats.dequantized import DequantizedSource
from llmopt.quantization.rtn import rtn
from llmopt.quantization.scheme import Scheme

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=51,
    tie_word_embeddings=False,
)
TOKENS = torch.arange(24).view(2, 12)
SYMMETRIC = [Scheme(8, None), Scheme(4, 32), Scheme(3, 32), Scheme(2, None)]


def save_tiny_llama(directory: Path, schemes: list[Scheme], dtype: torch.dtype) -> LlamaForCausalLM:
    """Write it quantized, schemes in turn; return the model with our dequantized weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    for parameter in model.parameters():  # not the rotary buffers, which stay float32 in use
        parameter.data = parameter.data.to(dtype)
    form, tensors, by_name = CompressedTensors(), {}, {}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = tensor.clone()
            continue
        scheme = schemes[len(by_name) % len(schemes)]
        by_name[module] = scheme
        quantized = rtn(tensor, scheme, scale_dtype=dtype)
        tensors |= form.pack(module, quantized)
        tensor.copy_(quantized.dequantize(dtype))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = CONFIG.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": form.config(by_name, ["lm_head"]),
    }
    (directory / "config.json").write_text(json.dumps(config))
    return model


def logits_in_transformers(directory: Path, **options: object) -> torch.Tensor:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(directory, **options)(TOKENS).logits


@pytest.mark.parametrize(
    ("schemes", "dtype"),
    [([scheme], torch.bfloat16) for scheme in SYMMETRIC]
    + [(SYMMETRIC, torch.float16), (SYMMETRIC, torch.float32)],
    ids=str,
)
def test_transformers_gives_the_logits_of_our_dequantized_weights(schemes, dtype, tmp_path):
    model = save_tiny_llama(tmp_path, schemes, dtype)
    with torch.no_grad():
        expected = model(TOKENS).logits
    assert torch.equal(logits_in_transformers(tmp_path), expected)


def test_asymmetric_weights_open_only_dequantized_as_the_table_says(tmp_path):
    scheme = Scheme(4, 32, False)
    model = save_tiny_llama(tmp_path, [scheme], torch.bfloat16)
    with torch.no_grad():
        expected = model(TOKENS).logits
    opened = logits_in_transformers(
        tmp_path, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert torch.equal(opened, expected)
    plain, dequantized = (
        load_consumers()[name].formats["compressed-tensors"]
        for name in ("transformers", "transformers-dequantize")
    )
    assert plain.refusals(scheme, 64, 64, 1, torch.bfloat16) != []
    assert dequantized.refusals(scheme, 64, 64, 1, torch.bfloat16) == []


def test_a_dequantized_source_has_the_names_and_weights_of_the_source(tmp_path):
    schemes = [Scheme(4, 32, False), Scheme(3, None), Scheme(8, 32)]
    model = save_tiny_llama(tmp_path, schemes, torch.bfloat16)
    source = DequantizedSource(open_checkpoint(tmp_path))
    expected = model.state_dict()
    assert sorted(source.names) == sorted(expected)
    assert len(source.quantized_modules) == 7
    for name in source.names:
        tensor, info = source.read(name), source.info(name)
        assert torch.equal(tensor.to(expected[name].dtype), expected[name])
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert info.num_bytes == tensor.nbytes
    assert source.scheme_of("model.layers.0.self_attn.q_proj") == schemes[0]


@pytest.mark.parametrize("section", [None, {"quant_method": "aqlm"}])
def test_what_no_format_reads_is_refused(section, tmp_path):
    save_tiny_llama(tmp_path, [Scheme(4, 32)], torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = section
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInputError, match="quantiz"):
        DequantizedSource(open_checkpoint(tmp_path))


def test_a_packed_weight_without_a_scheme_is_refused(tmp_path):
    save_tiny_llama(tmp_path, [Scheme(4, 32)], torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["model.layers.0.mlp.up_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = DequantizedSource(open_checkpoint(tmp_path))
    with pytest.raises(BadInputError, match="gives it no scheme"):
        source.read("model.layers.0.mlp.up_proj.weight")
