import pytest
import torch
from safetensors.torch import save_file
from support.quantized import random_tensor, with_midpoints

from llmopt.errors import BadInputError, RoundTripError
from llmopt.formats.awq import AWQ
from llmopt.formats.independent import RawShards, find_decoder
from llmopt.quantization.scheme import Scheme

FORM = AWQ()
ASYMMETRIC = Scheme(4, 32, symmetric=False)
SHAPE = (24, 96)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "scheme", [ASYMMETRIC, Scheme(4, 32), Scheme(4, None, False), Scheme(4, 16, True, "weight")]
)
def test_pack_and_unpack_are_inverse_and_a_second_decoder_agrees(scheme, dtype, tmp_path):
    tensor = random_tensor(scheme, SHAPE, dtype=dtype)
    packed = FORM.pack("a.b", tensor)
    assert {name: tuple(part.shape) for name, part in packed.items()} == {
        "a.b.qweight": (96, 3),
        "a.b.qzeros": (tensor.scales.shape[1], 3),
        "a.b.scales": (tensor.scales.shape[1], 24),
    }
    assert FORM.weight_shape("a.b", packed.__getitem__, scheme) == SHAPE
    assert FORM.unpack("a.b", packed.__getitem__, scheme).digest() == tensor.digest()
    save_file(packed, tmp_path / "x.safetensors")
    decoder = find_decoder(FORM.config({"a.b": scheme}, []))
    decoded = decoder.decode(RawShards([tmp_path / "x.safetensors"]), "a.b", scheme)
    assert decoded.digest() == tensor.digest()
    bits = 8 * sum(part.nbytes for part in packed.values()) / (24 * 96)
    assert FORM.bits_per_weight(scheme, SHAPE, dtype) == bits


def test_autoawqs_reader_gives_the_same_weight():
    """Its steps by hand: shift out nibbles, undo the order, subtract, multiply."""
    tensor = random_tensor(ASYMMETRIC, SHAPE)
    packed = FORM.pack("m", tensor)
    shifts = torch.arange(0, 32, 4)
    reverse = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])

    def nibbles(words):
        return ((words.unsqueeze(-1) >> shifts) & 0xF)[..., reverse].flatten(1)

    codes, zeros = nibbles(packed["m.qweight"]), nibbles(packed["m.qzeros"])
    groups = torch.arange(96) // 32
    weight = (codes - zeros[groups]) * packed["m.scales"].float()[groups]
    assert torch.equal(weight.t(), tensor.dequantize())


def test_a_symmetric_scheme_is_eight_everywhere():
    packed = FORM.pack("m", random_tensor(Scheme(4, 32), SHAPE))
    assert set(packed["m.qzeros"].flatten().tolist()) == {0x88888888 - (1 << 32)}
    as_stored = FORM.unpack("m", packed.__getitem__, ASYMMETRIC)
    plain = random_tensor(Scheme(4, 32), SHAPE)
    assert as_stored.digest() == with_midpoints(plain).digest()
    packed = FORM.pack("m", random_tensor(ASYMMETRIC, SHAPE))
    with pytest.raises(BadInputError, match="calls its scheme symmetric"):
        FORM.unpack("m", packed.__getitem__, Scheme(4, 32))


@pytest.mark.parametrize(
    ("scheme", "shape", "message"),
    [
        (Scheme(8, 32), SHAPE, "4 bits only"),
        (Scheme(4, 32, True, "group"), SHAPE, "no group index"),
        (Scheme(4, 32), (20, 96), "20 output features"),
    ],
)
def test_what_it_cannot_hold_is_refused(scheme, shape, message):
    assert message in (FORM.refusal(scheme) or FORM.shape_refusal(scheme, shape) or "")
    with pytest.raises(BadInputError, match=message):
        FORM.pack("m", random_tensor(scheme, shape))


@pytest.mark.parametrize(
    ("part", "spoil", "message"),
    [
        ("qweight", lambda t: t[:64], r"scales has shape \(3, 24\), expected \(2, 24\)"),
        ("qweight", lambda t: t[:90], "m: group size 32 does not divide 90"),
        ("qweight", lambda t: t[:, :2], "scales has shape"),
        ("qweight", lambda t: t.short(), "qweight is int16"),
        ("qzeros", lambda t: t[:, :2], "qzeros has shape"),
        ("scales", lambda t: t[:2], "scales has shape"),
        ("scales", lambda t: t * torch.inf, "NaN or infinity"),
        ("qzeros", None, "m.qzeros is missing"),
    ],
)
def test_parts_that_do_not_fit_are_named(part, spoil, message):
    packed = FORM.pack("m", random_tensor(ASYMMETRIC, SHAPE))
    if spoil is None:
        del packed[f"m.{part}"]
    else:
        packed[f"m.{part}"] = spoil(packed[f"m.{part}"])
    with pytest.raises(BadInputError, match=message):
        FORM.unpack("m", packed.__getitem__, ASYMMETRIC)


def test_the_second_decoder_refuses_what_awq_cannot_mean(tmp_path):
    packed = FORM.pack("m", random_tensor(ASYMMETRIC, SHAPE))
    packed["m.scales"] = packed["m.scales"][:2]
    save_file(
        {name: part.contiguous() for name, part in packed.items()}, tmp_path / "x.safetensors"
    )
    shards = RawShards([tmp_path / "x.safetensors"])
    decoder = find_decoder(FORM.config({"m": ASYMMETRIC}, []))
    with pytest.raises(RoundTripError, match="zero points"):
        decoder.decode(shards, "m", ASYMMETRIC)
    with pytest.raises(RoundTripError, match="cannot mean"):
        decoder.decode(shards, "m", Scheme(8, 32))


def test_the_config_is_written_as_its_readers_want_it():
    config = FORM.config({"a.q_proj": ASYMMETRIC, "a.k_proj": Scheme(4, 32)}, ["lm_head", "b.gate"])
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", "b.gate"],
    }
    table = FORM.schemes(config)
    assert table.scheme_of("a.q_proj") == ASYMMETRIC
    assert table.scheme_of("model.b.gate") is None
    assert FORM.companion_files(config) == {}


def test_a_config_that_its_readers_would_misread_is_refused():
    with pytest.raises(BadInputError, match="one group size"):
        FORM.config({"a": Scheme(4, 32), "b": Scheme(4, 64)}, [])
    with pytest.raises(BadInputError, match="would skip the quantized a.gate_proj"):
        FORM.config({"a.gate_proj": ASYMMETRIC}, ["a.gate"])
    with pytest.raises(BadInputError, match="no linear layer"):
        FORM.config({}, ["lm_head"])


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}, Scheme(4, 64)),
        ({"quant_method": "awq", "bits": 4, "group_size": -1, "version": "gemm"}, Scheme(4, None)),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "format": "gemm"}, Scheme(4, 128)),
        ({"modules_to_not_convert": None}, Scheme(4, 128)),
    ],
)
def test_old_and_new_configs_are_read(config, scheme):
    found = FORM.schemes(config).scheme_of("model.layers.0.self_attn.q_proj")
    assert found is not None and not found.symmetric
    assert found.group_size == scheme.group_size


def test_a_config_without_zero_points_is_symmetric():
    config = {"bits": 4, "group_size": 32, "zero_point": False}
    assert FORM.schemes(config).scheme_of("m") == Scheme(4, 32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"version": "gemv"}, "'gemv'"),
        ({"quant_method": "gptq"}, "gptq in the layout"),
        ({"bits": 8}, "8 bits"),
        ({"group_size": 0}, "groups of 0"),
        ({"q_group_size": "all"}, 'q_group_size is "all"'),
    ],
)
def test_configs_that_llmopt_does_not_read_are_refused(config, message):
    with pytest.raises(BadInputError, match=message):
        FORM.schemes(config)
