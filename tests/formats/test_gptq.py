import dataclasses
import itertools

import pytest
import torch
from safetensors.torch import save_file
from support.quantized import random_tensor, with_midpoints

from llmopt.errors import BadInputError, RoundTripError
from llmopt.formats import choose_format, read_format
from llmopt.formats.gptq import GPTQ
from llmopt.formats.independent import RawShards, find_decoder
from llmopt.quantization.scheme import INT_BITS, Scheme

V1, V2 = GPTQ("gptq"), GPTQ("gptq_v2")
ASYMMETRIC = Scheme(4, 32, symmetric=False)
GROUPED = Scheme(4, 32, False, "group")
SHAPE = (32, 96)


@pytest.mark.parametrize("form", [V1, V2], ids=lambda form: form.checkpoint_format)
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(bits, size, symmetric, order)
        for bits, size, symmetric in itertools.product(INT_BITS, (32, None), (True, False))
        for order in (("none", "group") if size else ("weight",))
    ],
    ids=lambda s: f"{s.label} {s.activation_order}",
)
def test_pack_and_unpack_are_inverse_and_a_second_decoder_agrees(form, scheme, tmp_path):
    tensor = random_tensor(scheme, SHAPE)
    packed = form.pack("a.b", tensor)
    assert packed["a.b.qweight"].shape == (96 * scheme.bits // 32, 32)
    assert all(part.is_contiguous() for part in packed.values())
    assert form.weight_shape("a.b", packed.__getitem__, scheme) == SHAPE
    assert form.unpack("a.b", packed.__getitem__, scheme).digest() == tensor.digest()
    save_file(packed, tmp_path / "x.safetensors")
    decoder = find_decoder(form.config({"a.b": scheme}, []))
    decoded = decoder.decode(RawShards([tmp_path / "x.safetensors"]), "a.b", scheme)
    assert decoded.digest() == tensor.digest()


def test_the_variants_differ_by_one_in_every_zero_point():
    tensor = random_tensor(Scheme(8, 32, False), SHAPE)
    one, two = V1.pack("m", tensor)["m.qzeros"], V2.pack("m", tensor)["m.qzeros"]
    assert torch.equal(one.view(torch.uint8) + 1, two.view(torch.uint8))
    middle = V1.pack("m", random_tensor(Scheme(4, 32), SHAPE))["m.qzeros"]
    assert set(middle.flatten().tolist()) == {0x77777777}


def test_a_zero_point_of_zero_is_written_in_v2_only():
    tensor = random_tensor(ASYMMETRIC, SHAPE)
    tensor.zero_points[3, 1] = 0
    with pytest.raises(BadInputError, match="zero point of 0"):
        V1.pack("m", tensor)
    packed = V2.pack("m", tensor)
    assert V2.unpack("m", packed.__getitem__, ASYMMETRIC).digest() == tensor.digest()


def test_shapes_that_do_not_fill_words_are_refused():
    assert "30 output features" in (V1.shape_refusal(Scheme(4, 32), (30, 96)) or "")
    assert "40 input features of 3 bits" in (V1.shape_refusal(Scheme(3, None), (32, 40)) or "")
    assert "one group only" in (V1.refusal(Scheme(4, None, True, "group")) or "")
    with pytest.raises(BadInputError, match="m: 30 output features"):
        V1.pack("m", random_tensor(Scheme(4, 32), (30, 96)))


@pytest.mark.parametrize(
    ("part", "spoil", "message"),
    [
        ("qweight", lambda t: t[:5], "group size 32 does not divide 40"),
        ("qweight", lambda t: t.long(), "qweight is int64, expected int32"),
        ("qzeros", lambda t: t[:2], r"qzeros has shape \(2, 4\), expected \(3, 4\)"),
        ("qzeros", lambda t: t[:, :3], "qzeros has shape"),
        ("scales", lambda t: t[:, :31], r"scales has shape \(3, 31\), expected \(3, 32\)"),
        ("scales", lambda t: t.double(), "scales is float64, expected bfloat16 or float16"),
        ("scales", lambda t: t / 0, "NaN or infinity"),
        ("g_idx", lambda t: t[:95], "g_idx has shape"),
        ("g_idx", lambda t: t.index_fill(0, torch.tensor([7]), 3), "g_idx holds 3, but .* 3 gro"),
        ("g_idx", lambda t: t.index_fill(0, torch.tensor([7]), -1), "g_idx holds -1"),
        ("g_idx", lambda t: t.half(), "g_idx is float16"),
        ("qzeros", lambda t: t | 0xF0, "qzeros holds 15: plus one"),
        ("qweight", None, "m.qweight is missing"),
        ("qzeros", None, "m.qzeros is missing"),
        ("scales", None, "m.scales is missing"),
        ("g_idx", None, "m.g_idx is missing"),
    ],
)
def test_parts_that_do_not_fit_are_named(part, spoil, message):
    packed = V1.pack("m", random_tensor(GROUPED, SHAPE))
    if spoil is None:
        del packed[f"m.{part}"]
    else:
        packed[f"m.{part}"] = spoil(packed[f"m.{part}"])
    with pytest.raises(BadInputError, match=message):
        V1.unpack("m", packed.__getitem__, GROUPED)


def test_an_order_of_groups_that_the_config_denies_is_refused():
    packed = V1.pack("m", random_tensor(GROUPED, SHAPE))
    with pytest.raises(BadInputError, match="desc_act false"):
        V1.unpack("m", packed.__getitem__, ASYMMETRIC)


def test_a_group_index_of_64_bits_is_read():
    tensor = random_tensor(GROUPED, SHAPE)
    packed = V1.pack("m", tensor)
    packed["m.g_idx"] = packed["m.g_idx"].long()
    assert V1.unpack("m", packed.__getitem__, GROUPED).digest() == tensor.digest()


@pytest.mark.parametrize(("written", "read"), [(V1, V2), (V2, V1)])
def test_the_wrong_checkpoint_format_is_seen_in_symmetric_files(written, read):
    packed = written.pack("m", random_tensor(Scheme(4, 32), SHAPE))
    wrong = f"checkpoint_format {read.checkpoint_format} is probably wrong"
    with pytest.raises(BadInputError, match=wrong):
        read.unpack("m", packed.__getitem__, Scheme(4, 32))


def test_zero_points_that_contradict_a_symmetric_config_are_refused(tmp_path):
    packed = V1.pack("m", random_tensor(ASYMMETRIC, SHAPE))
    with pytest.raises(BadInputError, match="calls its scheme symmetric"):
        V1.unpack("m", packed.__getitem__, Scheme(4, 32))
    save_file(packed, tmp_path / "x.safetensors")
    decoder = find_decoder(V1.config({"m": Scheme(4, 32)}, []))
    with pytest.raises(RoundTripError, match="besides the midpoint"):
        decoder.decode(RawShards([tmp_path / "x.safetensors"]), "m", Scheme(4, 32))
    middle = with_midpoints(random_tensor(Scheme(4, 32), SHAPE))
    packed = V1.pack("m", middle)
    assert V1.unpack("m", packed.__getitem__, Scheme(4, 32)).zero_points is None
    assert V1.unpack("m", packed.__getitem__, ASYMMETRIC).digest() == middle.digest()


def test_the_second_decoder_sees_what_is_out_of_range(tmp_path):
    packed = V2.pack("m", random_tensor(ASYMMETRIC, SHAPE))
    packed["m.qzeros"] |= 0xF
    save_file(packed, tmp_path / "x.safetensors")
    shards = RawShards([tmp_path / "x.safetensors"])
    decoder = find_decoder(V1.config({"m": ASYMMETRIC}, []))
    with pytest.raises(RoundTripError, match="zero point 16 is out of range"):
        decoder.decode(shards, "m", ASYMMETRIC)
    with pytest.raises(RoundTripError, match="unknown here"):
        find_decoder({"quant_method": "gptq"})
    with pytest.raises(RoundTripError, match="words for"):
        decoder.decode(shards, "m", dataclasses.replace(ASYMMETRIC, bits=8))


def test_what_is_stored_is_what_is_counted():
    for scheme, dtype in ((Scheme(4, 32), torch.float16), (Scheme(3, None, False), torch.float32)):
        packed = V1.pack("m", random_tensor(scheme, SHAPE, dtype=dtype))
        bits = 8 * sum(part.nbytes for part in packed.values()) / (32 * 96)
        assert V1.bits_per_weight(scheme, SHAPE, dtype) == bits


def test_variants_are_chosen_by_name_and_by_config():
    assert choose_format("gptq").checkpoint_format == "gptq"
    assert choose_format("gptq", "gptq_v2") == V2
    assert read_format({"quant_method": "gptq", "checkpoint_format": "GPTQ_V2"}) == V2
    for name, variant in (("awq", "gptq_v2"), ("gptq", "v3"), ("gguf", None)):
        with pytest.raises(BadInputError, match="format"):
            choose_format(name, variant)
