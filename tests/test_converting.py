"""Conversions are exact or refused; what is published was read back and is equal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.quantized import WIDTHS, random_tensor, with_midpoints, write_quantized
from support.tiny_models import llama_config, rewrite_tensors
from typer.testing import CliRunner

from llmopt import converting
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.cli import app
from llmopt.conversion import in_scheme, plan_conversion
from llmopt.converting import convert
from llmopt.errors import BadInputError, ContractError, RoundTripError
from llmopt.formats import FORMATS, choose_format
from llmopt.formats.base import Format
from llmopt.formats.dequantized import DequantizedSource
from llmopt.formats.gptq import GPTQ
from llmopt.formats.independent import RawShards, find_decoder
from llmopt.quantization.scheme import INT_BITS, Scheme
from llmopt.report.conversion import ConversionReport

TARGETS = [("compressed-tensors", None), ("gptq", "gptq"), ("gptq", "gptq_v2"), ("awq", None)]
W4 = Scheme(4, 32)
ASYMMETRIC = Scheme(4, 32, symmetric=False)


def source(folder: Path, form: Format, scheme: Scheme, **options) -> Path:
    write_quantized(folder / "source", form, lambda _: scheme, **options)
    return folder / "source"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_files(one: Path, other: Path) -> bool:
    names = ("model.safetensors", "config.json", "tokenizer.json")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


schemes = st.builds(
    Scheme,
    bits=st.sampled_from(INT_BITS),
    group_size=st.sampled_from([32, 64, None]),
    symmetric=st.booleans(),
    activation_order=st.sampled_from(["none", "weight", "group"]),
)


@given(
    scheme=schemes,
    one=st.sampled_from(TARGETS),
    other=st.sampled_from(TARGETS),
    rows=st.sampled_from([32, 64, 96]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_every_pair_of_formats_that_holds_a_scheme_round_trips(
    scheme, one, other, rows, dtype, seed, tmp_path_factory
):
    first, second = choose_format(*one), choose_format(*other)
    if first.refusal(scheme) or second.refusal(scheme):
        return
    tensor = random_tensor(scheme, (rows, 192), seed, dtype)
    read = first.unpack("m", first.pack("m", tensor).__getitem__, scheme)
    there = second.pack("m", in_scheme(read, scheme))
    file = tmp_path_factory.getbasetemp() / "pair.safetensors"
    save_file(there, file)
    decoder = find_decoder(second.config({"m": scheme}, []))
    assert decoder.decode(RawShards([file]), "m", scheme).digest() == tensor.digest()
    back = first.pack("m", second.unpack("m", there.__getitem__, scheme))
    expected = first.pack("m", tensor)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)


@pytest.mark.parametrize("target", TARGETS[1:], ids=str)
@pytest.mark.parametrize("scheme", [W4, ASYMMETRIC, Scheme(4, None)], ids=lambda s: s.label)
def test_there_and_back_again_gives_the_same_bytes(scheme, target, tmp_path):
    start = source(tmp_path, FORMATS["compressed-tensors"], scheme)
    name, variant = target
    result = convert(start, name, tmp_path / "there", checkpoint_format=variant)
    assert result.published and result.path == tmp_path / "there"
    convert(tmp_path / "there", "compressed-tensors", tmp_path / "back")
    assert same_files(start, tmp_path / "back")
    report = ConversionReport.model_validate_json((tmp_path / "there/conversion.json").read_text())
    assert (report.outcome, report.num_quantized, report.format) == ("pass", 7, name)
    assert report.num_copied == 5 and report.schemes == {scheme.label: 7}
    assert report.consumers and "second decoder" in (tmp_path / "there/README.md").read_text()
    assert not list(tmp_path.glob(".*staging*"))


def test_gptq_goes_from_one_variant_to_the_other(tmp_path):
    start = source(tmp_path, GPTQ("gptq"), ASYMMETRIC)
    convert(start, "gptq", tmp_path / "v2", checkpoint_format="gptq_v2")
    one, two = tensors_of(start), tensors_of(tmp_path / "v2")
    different = {name for name in one if not torch.equal(one[name], two[name])}
    assert different and all(name.endswith("qzeros") for name in different)
    with pytest.raises(BadInputError, match="already"):
        convert(start, "gptq", tmp_path / "v1")


def test_an_order_of_groups_goes_to_what_holds_it_and_no_further(tmp_path):
    start = source(tmp_path, FORMATS["gptq"], Scheme(4, 32, False, "group"))
    with pytest.raises(ContractError, match="no group index"):
        convert(start, "awq", tmp_path / "awq")
    with pytest.raises(ContractError, match="removed|no longer supported"):
        convert(start, "compressed-tensors", tmp_path / "ct")
    convert(start, "gptq", tmp_path / "v2", checkpoint_format="gptq_v2")
    assert not (tmp_path / "awq").exists() and not list(tmp_path.glob(".*staging*"))


def test_a_sorted_group_index_is_none(tmp_path):
    def sort(tensor):
        return dataclasses.replace(tensor, group_index=tensor.group_index.sort().values)

    start = source(tmp_path, FORMATS["gptq"], Scheme(4, 32, True, "group"), change=sort)
    convert(start, "awq", tmp_path / "awq")
    convert(tmp_path / "awq", "gptq", tmp_path / "back")
    assert (
        json.loads((tmp_path / "back/config.json").read_text())["quantization_config"]["desc_act"]
        is False
    )
    assert torch.equal(
        *(tensors_of(f)["model.layers.0.mlp.up_proj.qweight"] for f in (start, tmp_path / "back"))
    )


def test_zero_points_in_the_middle_make_a_scheme_symmetric(tmp_path):
    start = source(tmp_path, FORMATS["awq"], W4, change=with_midpoints)
    convert(start, "gptq", tmp_path / "gptq", consumers=["vllm-cpu"])
    section = json.loads((tmp_path / "gptq/config.json").read_text())["quantization_config"]
    assert section["sym"] is True


@pytest.mark.parametrize(
    ("form", "scheme", "to", "message"),
    [
        ("gptq", Scheme(8, 32), "awq", "4 bits only"),
        ("gptq", Scheme(3, 32), "awq", "4 bits only"),
        ("compressed-tensors", Scheme(3, None), "nonsense", "unknown format"),
    ],
)
def test_what_a_target_cannot_hold_is_refused_before_any_work(form, scheme, to, message, tmp_path):
    start = source(tmp_path, FORMATS[form], scheme)
    with pytest.raises(BadInputError, match=message):
        convert(start, to, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*staging*"))


def test_zero_points_of_zero_go_to_v2_only(tmp_path):
    def lower(tensor):
        return dataclasses.replace(tensor, zero_points=tensor.zero_points - 1)

    start = source(tmp_path, FORMATS["awq"], ASYMMETRIC, change=lower)
    with pytest.raises(ContractError, match="zero points of 0"):
        convert(start, "gptq", tmp_path / "v1")
    assert convert(start, "gptq", tmp_path / "v2", checkpoint_format="gptq_v2").published


def test_mixed_schemes_and_kept_layers_are_told(tmp_path):
    kinds = {"down_proj": Scheme(8, None), "o_proj": None}
    write_quantized(
        tmp_path / "source",
        FORMATS["compressed-tensors"],
        lambda module: kinds.get(module.rpartition(".")[2], W4),
        ignored=("model.layers.0.self_attn.o_proj", "lm_head"),
    )
    with pytest.raises(ContractError, match="one group size"):
        convert(tmp_path / "source", "awq", tmp_path / "awq")
    convert(tmp_path / "source", "gptq", tmp_path / "gptq", consumers=["vllm"])
    written = DequantizedSource(open_checkpoint(tmp_path / "gptq"))
    found = {m.rpartition(".")[2]: written.scheme_of(m) for m in written.quantized_modules}
    assert found.pop("down_proj") == Scheme(8, None) and set(found.values()) == {W4}
    assert "o_proj" not in found
    with pytest.raises(ContractError, match="auto-gptq .*no rules|no rules for single layers"):
        convert(tmp_path / "source", "gptq", tmp_path / "old", consumers=["auto-gptq"])


def test_a_consumer_that_would_refuse_it_is_named(tmp_path):
    start = source(tmp_path, FORMATS["awq"], ASYMMETRIC)
    with pytest.raises(ContractError, match=r"vllm-cpu .*0\.32\.0.*: .*sym=False"):
        convert(start, "gptq", tmp_path / "out", consumers=["vllm-cpu"])


@pytest.mark.parametrize(
    ("consumers", "message"),
    [
        (["vllm", "autoawq"], r"autoawq autoawq 0\.2\.9: it does not open gptq: "),
        (["vllm", "vlm"], "did you mean 'vllm'"),
    ],
)
def test_consumers_of_other_formats_are_refused_before_anything_is_read(
    consumers, message, tmp_path
):
    def fail(*_):
        raise AssertionError("codes were read first")

    start = source(tmp_path, FORMATS["awq"], ASYMMETRIC)
    with pytest.raises(ContractError, match=message):
        plan_conversion(start, "gptq", consumers=consumers, progress=fail)


def test_progress_comes_to_its_end(tmp_path):
    told: dict[str, tuple[int, int]] = {}
    start = source(tmp_path, FORMATS["awq"], ASYMMETRIC)
    plan_conversion(start, "gptq", progress=lambda task, *steps: told.update({task: steps}))
    assert told == {"read codes": (7, 7), "hash codes": (7, 7), "hash the rest": (5, 5)}


def test_a_consumer_is_held_to_the_element_type_of_every_layers_scales(tmp_path):
    wide: list[torch.dtype] = []

    def widen_one(tensor):
        dtype = torch.float16 if wide else torch.float32
        wide.append(dtype)
        return dataclasses.replace(tensor, scales=tensor.scales.to(dtype))

    start = source(tmp_path, FORMATS["gptq"], W4, change=widen_one)
    assert wide.count(torch.float32) == 1 and len(wide) == 7
    with pytest.raises(ContractError, match="vllm .*: float32 models"):
        convert(start, "compressed-tensors", tmp_path / "out", consumers=["vllm"])
    plan = plan_conversion(start, "compressed-tensors")
    assert {held.name for held in plan.consumers} == {"transformers", "transformers-dequantize"}


def test_a_consumer_is_held_to_the_element_type_of_the_model_too(tmp_path):
    def narrow(tensor):
        return dataclasses.replace(tensor, scales=tensor.scales.half())

    start = source(tmp_path, FORMATS["gptq"], W4, change=narrow, dtype=torch.float32)
    with pytest.raises(ContractError, match="vllm .*: float32 models"):
        convert(start, "compressed-tensors", tmp_path / "out", consumers=["vllm"])


@pytest.mark.parametrize("fault", ["codes", "scales", "norm", "config"])
def test_what_is_not_equal_goes_to_quarantine(fault, tmp_path, monkeypatch):
    start = source(tmp_path, FORMATS["compressed-tensors"], W4)
    original = converting.write_config

    def spoil(directory, *arguments):
        original(directory, *arguments)
        if fault == "config":
            text = (directory / "config.json").read_text()
            (directory / "config.json").write_text(text.replace('"bits": 4', '"bits": 8'))
            return
        name = {"codes": "mlp.up_proj.qweight", "scales": "mlp.up_proj.scales"}.get(
            fault, "input_layernorm.weight"
        )
        rewrite_tensors(
            directory, lambda t: t[f"model.layers.0.{name}"].view(torch.uint8).view(-1)[:1].add_(1)
        )

    monkeypatch.setattr(converting, "write_config", spoil)
    with pytest.raises(RoundTripError, match="quarantine"):
        convert(start, "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = json.loads((tmp_path / "out.quarantine/conversion.json").read_text())
    assert report["outcome"] == "fail" and report["different"]
    assert "must not be used" in (tmp_path / "out.quarantine/README.md").read_text()


def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch):
    start = source(tmp_path, FORMATS["compressed-tensors"], W4)
    with monkeypatch.context() as patched:

        def die(*_):
            raise KeyboardInterrupt

        patched.setattr(converting, "write_config", die)
        with pytest.raises(KeyboardInterrupt):
            convert(start, "awq", tmp_path / "out")
    with pytest.raises(BadInputError, match="interrupted run"):
        convert(start, "awq", tmp_path / "out")
    assert convert(start, "awq", tmp_path / "out", resume=True).published


def test_the_command_line(tmp_path):
    start = source(tmp_path, FORMATS["awq"], ASYMMETRIC)
    arguments = ["convert", str(start), "--to", "compressed-tensors", "-o", str(tmp_path / "out")]
    tried = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert tried.exit_code == 0 and "7 weights would be exact" in tried.stdout
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "every tensor equals" in done.stdout
    assert (tmp_path / "out/conversion.json").is_file()


def test_biases_and_a_tied_head_are_carried(tmp_path):
    config = llama_config(
        vocab_size=512, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **WIDTHS
    )
    start = source(tmp_path, FORMATS["gptq"], W4, config=config)
    convert(start, "awq", tmp_path / "out")
    before, after = tensors_of(start), tensors_of(tmp_path / "out")
    names = [name for name in before if name.endswith("bias")]
    assert len(names) == 7 and all(torch.equal(before[n], after[n]) for n in names)


def test_the_room_it_asks_for_is_enough(tmp_path):
    start = source(tmp_path, FORMATS["awq"], ASYMMETRIC)
    asked = converting._needed_bytes(plan_conversion(start, "gptq"))
    convert(start, "gptq", tmp_path / "out")
    weights = sum(part.nbytes for part in tensors_of(tmp_path / "out").values())
    assert weights < asked < 2 * weights
