"""llmopt.load: a checkpoint that stays packed and means what its dequantized weights mean."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.packed_weights import random_weight
from support.tiny_models import build_model, gemma3_config, llama_biased_config, qwen2_config
from support.triton_interpreter import install

from llmopt.errors import BadInputError
from llmopt.formats.compressed_tensors import CompressedTensors
from llmopt.loading import load
from llmopt.quantization.rtn import rtn
from llmopt.quantization.scheme import Scheme
from llmopt.quantized_linear import QuantizedLinear, kernel_refusals, layout_for
from llmopt_kernels import launching
from llmopt_kernels.cpu_int4 import CpuInt4Weight
from llmopt_kernels.gpu_weight import GpuWeight, from_gpu_weight
from llmopt_kernels.packed_weight import PackedWeight

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
W4 = Scheme(bits=4, group_size=32)


def write_quantized(directory: Path, config, scheme_of, *, dtype=torch.float32):
    """Write a random model with ``scheme_of(module name)`` applied; return its dense meaning."""
    model = build_model(config).to(dtype)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    schemes, meaning = {}, {}
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        module = name.removesuffix(".weight")
        scheme = scheme_of(module)
        if scheme is None:
            continue
        quantized = rtn(tensors.pop(name).float(), scheme, scale_dtype=dtype)
        tensors |= CompressedTensors().pack(module, quantized)
        schemes[module], meaning[name] = scheme, quantized.dequantize()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    file = directory / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"] = CompressedTensors().config(schemes, ["lm_head"])
    file.write_text(json.dumps(content))
    # Built anew: converting the model has rounded its rotary frequencies too.
    dense = build_model(config)
    dense.load_state_dict({k: v.float() for k, v in model.state_dict().items()} | meaning)
    return dense.eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.float()


TOKENS = torch.arange(40).view(2, 20) * 7 % 90


def mixed(module):
    """Every width, and both symmetries, in one model; one layer is left alone."""
    kinds = {
        "q_proj": W4,
        "k_proj": Scheme(bits=4, group_size=32, symmetric=False),
        "v_proj": Scheme(bits=8, group_size=None),
        "o_proj": Scheme(bits=4, group_size=None),
        "gate_proj": Scheme(bits=3, group_size=64),
        "up_proj": Scheme(bits=2, group_size=32, symmetric=False),
    }
    return kinds.get(module.rpartition(".")[2])


@pytest.mark.parametrize(
    "config", [llama_biased_config(**WIDE), gemma3_config(**WIDE), qwen2_config(**WIDE)]
)
def test_logits_are_those_of_the_dequantized_weights(tmp_path, config):
    dense = write_quantized(tmp_path, config, mixed)
    model = load(tmp_path)
    assert model.dtype == torch.float32
    kinds = {type(m.weight).__name__ for m in model.modules() if isinstance(m, QuantizedLinear)}
    assert kinds == {"CpuInt4Weight", "PackedWeight"}
    torch.testing.assert_close(logits(model, TOKENS), logits(dense, TOKENS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_near_the_dequantized_weights(tmp_path, dtype):
    dense = write_quantized(tmp_path, llama_biased_config(**WIDE), lambda _: W4, dtype=dtype)
    model = load(tmp_path)
    assert model.dtype == dtype and not model.training
    # The dense model in the same type bounds what its activations' rounding costs.
    expected = logits(dense, TOKENS)
    found = logits(model, TOKENS)
    for parameter in dense.parameters():
        parameter.data = parameter.data.to(dtype)
    floor = (logits(dense, TOKENS) - expected).norm()
    assert (found - expected).norm() < 2 * floor


def test_a_given_dtype_is_taken(tmp_path):
    dense = write_quantized(
        tmp_path, llama_biased_config(**WIDE), lambda _: W4, dtype=torch.bfloat16
    )
    model = load(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model, TOKENS), logits(dense, TOKENS), atol=1e-4, rtol=1e-4)
    with pytest.raises(BadInputError, match="float64 is not served"):
        load(tmp_path, dtype=torch.float64)


def test_packed_weights_take_a_third_of_sixteen_bits(tmp_path):
    scheme = Scheme(bits=4, group_size=64)
    write_quantized(tmp_path, llama_biased_config(**WIDE), lambda _: scheme, dtype=torch.bfloat16)
    linears = [m for m in load(tmp_path).modules() if isinstance(m, QuantizedLinear)]
    assert len(linears) == 3 * 7
    held = sum(b.nbytes for m in linears for n, b in m.named_buffers() if n != "bias")
    assert held < 0.35 * sum(2 * m.in_features * m.out_features for m in linears)
    assert not any(list(m.parameters()) for m in linears)


def test_generation_equals_the_dense_models(tmp_path):
    dense = write_quantized(tmp_path, llama_biased_config(**WIDE), lambda _: W4)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "top_k": 7}))
    model = load(tmp_path)
    assert model.generation_config.top_k == 7
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS[:1], **options), dense.generate(TOKENS[:1], **options))


def test_tied_embeddings_are_one_tensor(tmp_path):
    write_quantized(tmp_path, gemma3_config(**WIDE), lambda _: W4)
    model = load(tmp_path)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_what_is_not_such_a_checkpoint_is_refused(tmp_path):
    build_model(llama_biased_config(**WIDE)).save_pretrained(tmp_path)
    with pytest.raises(BadInputError, match="not quantized"):
        load(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    for section, message in (
        ({"quant_method": "aqlm", "bits": 4}, "'aqlm'"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": {}}},
            },
            "float-quantized",
        ),
    ):
        file.write_text(json.dumps({**content, "quantization_config": section}))
        with pytest.raises(BadInputError, match=message):
            load(tmp_path)


def linear_of(scheme, bias=None, dtype=torch.float32, shape=(48, 64)):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tensor = rtn(weight, scheme, scale_dtype=torch.bfloat16)
    return tensor, QuantizedLinear(tensor, bias, dtype)


def test_the_layer_says_which_product_it_uses():
    assert "int4 kernel for small batches" in str(linear_of(W4)[1])
    assert "cannot hold 3 bits" in str(linear_of(Scheme(bits=3, group_size=32))[1])
    assert "cannot hold 47 rows" in str(linear_of(W4, shape=(47, 64))[1])
    assert "W4A16" in str(linear_of(W4)[1]) and "group_size=32" in str(linear_of(W4)[1])


@pytest.mark.parametrize("symmetric", [True, False])
def test_conversion_to_another_dtype_keeps_the_meaning(symmetric):
    scheme = Scheme(bits=4, group_size=32, symmetric=symmetric)
    bias = torch.arange(48.0)
    tensor, linear = linear_of(scheme, bias, torch.bfloat16)
    linear.to(torch.float32)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected = x @ tensor.dequantize().T + bias
    # bfloat16 zeros were rounded to eight bits, up to 8 scales * 2^-9 each.
    torch.testing.assert_close(linear(x), expected, atol=1e-4 if symmetric else 0.15, rtol=1e-4)


def test_another_device_takes_the_plain_layout(monkeypatch):
    tensor, linear = linear_of(Scheme(bits=4, group_size=32, symmetric=False))
    converted = []
    original = QuantizedLinear._hold

    def hold(self, weight):
        converted.append(type(weight))
        original(self, weight)

    monkeypatch.setattr(QuantizedLinear, "_hold", hold)
    monkeypatch.setattr("llmopt.quantized_linear._KERNEL_LAYOUTS", {})
    linear.to("cpu")
    assert converted == [PackedWeight]
    assert isinstance(linear.weight, PackedWeight)
    torch.testing.assert_close(
        linear.weight.dequantize(torch.float32), tensor.dequantize(), atol=0, rtol=1e-5
    )
    monkeypatch.undo()
    linear.to("cpu")
    assert "int4 kernel" in linear.path


@pytest.mark.parametrize(
    ("weight", "on_cpu", "on_gpu"),
    [
        (random_weight(16, 64, 1)[1], CpuInt4Weight, GpuWeight),
        (random_weight(16, 64, 1, bits=8)[1], PackedWeight, GpuWeight),
        (random_weight(16, 64, 2, indexed=True)[1], PackedWeight, GpuWeight),
        (random_weight(16, 64, 1, bits=3)[1], PackedWeight, PackedWeight),
        (random_weight(16, 80, 1)[1], PackedWeight, PackedWeight),
    ],
)
def test_the_layout_follows_the_device(weight, on_cpu, on_gpu):
    refusals = kernel_refusals(weight)
    assert layout_for("cpu", refusals) is on_cpu
    assert layout_for("cuda", refusals) is on_gpu
    assert layout_for("xpu", refusals) is PackedWeight


def test_without_triton_a_gpu_takes_the_plain_layout(monkeypatch):
    monkeypatch.setattr("llmopt.quantized_linear.find_spec", lambda name: None)
    refusals = kernel_refusals(random_weight(16, 64, 1)[1])
    assert layout_for("cuda", refusals) is PackedWeight
    assert refusals[GpuWeight] == "anything: triton is not installed"


def as_if_on_a_gpu(monkeypatch):
    """Let modules on the CPU take the GPU's layout and run its kernel, in the interpreter."""
    monkeypatch.setattr("llmopt.quantized_linear._KERNEL_LAYOUTS", {"cpu": GpuWeight})
    monkeypatch.setattr(
        import_module("llmopt_kernels.linear_w4a16"), "runs_kernel", lambda tensor: True
    )


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_layer_goes_to_the_gpu_layout_and_back(monkeypatch, symmetric, indexed):
    scheme = Scheme(bits=4, group_size=32, symmetric=symmetric)
    tensor, linear = linear_of(scheme)
    if indexed:
        index = torch.arange(64, dtype=torch.int32) * 7 % 64 // 32
        tensor = replace(tensor, group_index=index)
        linear = QuantizedLinear(tensor, None, torch.float32)
    with monkeypatch.context() as patched:
        as_if_on_a_gpu(patched)
        linear.to("cpu")
        assert isinstance(linear.weight, GpuWeight) and "Triton kernel" in linear.path
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected = x @ tensor.dequantize().T
    torch.testing.assert_close(linear(x), expected, atol=1e-5, rtol=1e-4)
    linear.to("cpu")
    assert isinstance(linear.weight, PackedWeight if indexed else CpuInt4Weight)
    assert linear.column_order is None
    torch.testing.assert_close(linear(x), expected, atol=1e-5, rtol=1e-4)


def test_a_layer_made_for_a_gpu_keeps_its_scales(monkeypatch):
    """Laid out for the CPU first, they would be rounded to the type of the input."""
    tensor, _ = linear_of(Scheme(bits=4, group_size=32, symmetric=False))
    scales = torch.rand(tensor.scales.shape, generator=torch.Generator().manual_seed(2)) + 0.1
    tensor = replace(tensor, scales=scales)
    as_if_on_a_gpu(monkeypatch)
    linear = QuantizedLinear(tensor, None, torch.bfloat16, "cpu")
    assert isinstance(linear.weight, GpuWeight)
    assert torch.equal(from_gpu_weight(linear.weight).scales, scales)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter serves where no GPU does")
def test_a_model_runs_through_the_triton_kernel(tmp_path, monkeypatch):
    install()
    schemes = {**dict.fromkeys(["q_proj", "gate_proj", "down_proj"], W4), "o_proj": Scheme(8, None)}
    write_quantized(
        tmp_path,
        llama_biased_config(
            **{
                **WIDE,
                "num_hidden_layers": 1,
            }
        ),
        lambda module: schemes.get(module.rpartition(".")[2]),
        dtype=torch.float16,
    )
    model = load(tmp_path)
    expected = logits(model, TOKENS)
    as_if_on_a_gpu(monkeypatch)
    model.to("cpu")
    kinds = [type(m.weight) for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert kinds == [GpuWeight] * 4
    launched = []

    def launch(*arguments, **options):
        launched.append(arguments[0])
        launching.launch(*arguments, **options)

    monkeypatch.setattr(import_module("llmopt_kernels.linear_w4a16"), "launch", launch)
    torch.testing.assert_close(logits(model, TOKENS), expected, atol=2e-2, rtol=2e-2)
    assert len(launched) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a model on a GPU needs one")
def test_a_model_on_a_gpu_takes_the_kernel(tmp_path):
    write_quantized(tmp_path, llama_biased_config(**WIDE), lambda _: W4, dtype=torch.bfloat16)
    expected = logits(load(tmp_path), TOKENS)
    model = load(tmp_path, device="cuda")
    assert {type(m.weight) for m in model.modules() if isinstance(m, QuantizedLinear)} == {
        GpuWeight
    }
    found = logits(model, TOKENS.cuda()).cpu()
    assert (found - expected).norm() < 0.03 * expected.norm()
