import pytest
import torch
from quantization.ggml.samples import SAMPLES, importance, sample

from llmopt.errors import BadInputError, NumericalError
from llmopt.quantization.ggml.packing import pack_blocks, unpack_blocks
from llmopt.quantization.ggml.quantize import quantize_blocks
from llmopt.quantization.ggml.types import GGML_TYPES

BLOCK_TYPES = [kind for kind in GGML_TYPES.values() if not kind.is_plain]
SEARCHES = ["compatible", "least-squares"]


def named(kind):
    return kind.name


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=named)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_what_is_found_is_sound_and_survives_its_bytes(search, kind, weighted):
    weight = torch.cat([sample(name, 2, 512) for name in SAMPLES])
    given = importance(512) if weighted else None
    before = weight.clone()
    tensor = quantize_blocks(weight, kind, importance=given, search=search)
    assert torch.equal(weight, before)
    again = unpack_blocks(pack_blocks(tensor), kind, 512)
    assert torch.equal(again.dequantize(), tensor.dequantize())
    assert again.digest() == tensor.digest()
    h = torch.ones(512) if given is None else given
    errors = ((tensor.dequantize() - weight).square() * h).view(len(SAMPLES), -1).sum(1)
    energies = (weight.square() * h).view(len(SAMPLES), -1).sum(1)
    # Two bits keep four fifths of a Gaussian's energy; a float16 scale is too coarse for the tiny.
    bounds = torch.full_like(errors, {2: 0.2, 3: 0.06}.get(kind.bits, 0.02))
    bounds[SAMPLES.index("tiny")] = 1.0
    assert bool((errors <= bounds * energies).all()), errors / energies


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=named)
def test_element_types_of_the_weight_do_not_matter(search, kind):
    weight = sample("bfloat16", 2, 256)
    found = pack_blocks(quantize_blocks(weight.bfloat16(), kind, search=search))
    assert torch.equal(found, pack_blocks(quantize_blocks(weight, kind, search=search)))


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=named)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(kind, bad):
    weight = sample("gaussian", 2, 256)
    weight[1, 200] = bad
    with pytest.raises(NumericalError, match="NaN or infinity in a weight"):
        quantize_blocks(weight, kind)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=named)
def test_scales_beyond_float16_are_refused(search, kind):
    with pytest.raises(NumericalError, match="beyond the float16"):
        quantize_blocks(sample("gaussian", 2, 256) * 1e10, kind, search=search)


@pytest.mark.parametrize(
    ("weight", "given", "words"),
    [
        (torch.ones(2, 128), None, "do not make up rows of 128"),
        (torch.ones(256), None, "only floating-point matrices"),
        (torch.ones(2, 256, dtype=torch.int32), None, "only floating-point matrices"),
        (torch.ones(2, 256), torch.ones(128), "an importance of shape"),
        (torch.ones(2, 256), -torch.ones(256), "negative, NaN or infinite"),
        (torch.ones(2, 256), torch.full((256,), float("nan")), "negative, NaN or infinite"),
    ],
)
def test_what_does_not_fit_together_is_refused(weight, given, words):
    with pytest.raises(BadInputError, match=words):
        quantize_blocks(weight, GGML_TYPES["Q4_K"], importance=given)


def test_plain_types_and_unknown_searches_are_refused():
    with pytest.raises(BadInputError, match="pack_plain"):
        quantize_blocks(torch.ones(1, 32), GGML_TYPES["F16"])
    with pytest.raises(BadInputError, match="no search"):
        quantize_blocks(torch.ones(1, 32), GGML_TYPES["Q8_0"], search="best")
