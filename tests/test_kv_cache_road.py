"""The road with a ``kv_cache`` section: scales, config, round trip, verdict, consumers."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_jobs import small_recipe, write_job, write_text
from torch import Tensor

import llmopt
from llmopt.cache_scales import find_scales
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import read_structure
from llmopt.comparison import compare
from llmopt.conversion import plan_conversion
from llmopt.errors import BadInputError, ContractError, NumericalError, RoundTripError
from llmopt.evaluation import evaluate
from llmopt.formats.dequantized import DequantizedSource
from llmopt.formats.kv_cache import CONFIG_KEY, own_section, read_cache, read_settings, scale_tensor
from llmopt.kv_cache.settings import KVCacheSettings
from llmopt.pipeline import quantize
from llmopt.recipe import Recipe, load_recipe, parse_recipe
from llmopt.report.schema import Report
from llmopt.scoring import WalkerScorer
from llmopt.targets import checkpoint
from llmopt.targets.checkpoint import CheckpointTarget
from llmopt_evals.scorer import Branches

LONG = {"max_tokens": 128, "num_contexts": 30, "recall_passages": 30, "recall_pairs": 4}
CALIBRATION = {"num_samples": 6, "sequence_length": 64}
MARGINS = {"kv_mean_kl": 9.0, "kv_recall_drop": 1.0}


def recipe(text: Path | str, kv_cache: dict[str, Any], **changes: Any) -> Recipe:
    gate = {"long_context": LONG, "margins": MARGINS}
    return small_recipe(text, kv_cache=kv_cache, **{"gate": gate, **changes})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("llama"), dtype=torch.float32)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory, source: Path, text: Path) -> tuple[Path, Report]:
    output = tmp_path_factory.mktemp("fp8") / "out"
    result = quantize(source, recipe(text, {"kind": "fp8"}), output)
    assert result.published
    return output, result.report


def test_scales_lie_where_consumers_look_and_are_in_ledger_and_report(
    fp8: tuple[Path, Report], source: Path
) -> None:
    output, report = fp8
    reader = open_checkpoint(output)
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"]["strategy"] == "tensor"
    added = {entry.name for entry in report.ledger.entries if str(entry.fate) == "added"}
    names = {f"model.layers.{i}.self_attn.{part}_scale" for i in range(3) for part in "kv"}
    assert (
        added
        == names
        == set(reader.names)
        - {name for name in reader.names if "_scale" not in name or "weight" in name}
    )
    assert report.round_trip.num_tensors == len(report.ledger.entries)
    for record in report.cache_scales:
        stored = (
            reader.read(f"{record.attention}.k_scale"),
            reader.read(f"{record.attention}.v_scale"),
        )
        assert (float(stored[0]), float(stored[1])) == (record.k_scale, record.v_scale)
        assert record.k_scale == pytest.approx(record.largest_key / 448, rel=1e-6)
        assert record.v_scale == pytest.approx(record.largest_value / 448, rel=1e-6)
        assert 448 * record.k_scale >= record.largest_key
    assert sum(total.num_bytes for total in report.ledger.totals.values()) == sum(
        open_checkpoint(source).info(name).num_bytes for name in open_checkpoint(source).names
    )


def test_transformers_computes_the_cache_that_the_gate_judged(
    fp8: tuple[Path, Report], source: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    output, _ = fp8
    tokens = torch.randint(0, 512, (1, 50), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(output)(tokens, use_cache=True).logits[0]
        sixteen_bit = llmopt.load(output)(tokens).logits[0]
    comparison = compare(open_checkpoint(output), open_checkpoint(source))
    assert comparison.kv_cache is not None
    scorer = WalkerScorer(
        comparison.candidate_structure, comparison.candidate, tmp_path, kv_cache=comparison.kv_cache
    )
    ours = scorer.score([tokens[0]]).logits(0, 0, 50)
    apart = float((theirs - sixteen_bit).abs().max())
    assert float((ours - theirs).abs().max()) < apart / 100 < apart


def test_the_verdict_counts_weights_and_cache_together(
    fp8: tuple[Path, Report], source: Path, text: Path
) -> None:
    output, report = fp8
    criteria = {c.name: c for c in report.verdict.criteria}
    assert criteria["kv_mean_kl"].estimate > 1e-4
    assert "kv_recall_drop" not in criteria  # random weights recall nothing
    assert any("recall is not informative" in note for note in report.verdict.notes)
    assert report.verdict.kv_cache is not None and report.verdict.kv_cache.label == "fp8"
    strict = recipe(
        text,
        {"kind": "fp8"},
        evaluation={"sources": [str(text)]},
        gate={"long_context": LONG, "margins": {**MARGINS, "kv_mean_kl": 1e-5}},
    )
    again = evaluate(output, source, recipe=strict)
    assert {c.name for c in again.verdict.criteria} == set(criteria)
    failed = {c.name for c in again.verdict.criteria if c.outcome != "pass"}
    assert failed == {"kv_mean_kl"} and again.verdict.outcome == "fail"


def test_a_scale_that_is_not_what_was_calibrated_is_refused(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = CheckpointTarget.finish

    def plant(self: CheckpointTarget, artifact: Any, progress: Any) -> Any:
        done = finish(self, artifact, progress)
        file = artifact.directory / artifact.journal.blocks[1].shard.file
        tensors = load_file(file)
        tensors["model.layers.1.self_attn.v_scale"] *= 2
        save_file(tensors, file, {"format": "pt"})
        return done

    monkeypatch.setattr(CheckpointTarget, "finish", plant)
    with pytest.raises(RoundTripError, match=r"1 tensors .*layers\.1\.self_attn\.v_scale"):
        quantize(source, recipe(text, {"kind": "fp8"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_only_our_engine_has_is_recorded_for_it(
    source: Path, text: Path, tmp_path: Path
) -> None:
    cache = {"kind": "int4", "page_size": 16, "recent_window": 24}
    output = tmp_path / "out"
    rounding = {"solver": "rtn", "scheme": {"bits": 8, "group_size": 32}}
    result = quantize(source, recipe(text, cache, stage=rounding), output)
    assert result.published and result.report.calibration is None
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"] is None
    assert read_settings(config) == KVCacheSettings(**cache)
    opened = DequantizedSource(open_checkpoint(output))
    assert opened.config == {k: v for k, v in open_checkpoint(source).config.items()}
    assert llmopt.load(output)(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    details = [check.detail for check in result.report.consumers[0].checks]
    assert any("keeps a 16-bit cache" in detail for detail in details)
    with pytest.raises(ContractError, match="which a conversion would lose"):
        plan_conversion(output, "gptq")


def test_branches_read_an_int4_cache_as_their_own_sequences_do(
    source: Path, tmp_path: Path
) -> None:
    reader = open_checkpoint(source)
    structure = read_structure(reader)
    config = {CONFIG_KEY: own_section(KVCacheSettings("int4", 16, 16))}
    cache = read_cache(config, reader, structure)
    generator = torch.Generator().manual_seed(2)

    def some(count: int) -> Tensor:
        return torch.randint(0, 512, (count,), generator=generator)

    items = [Branches(some(40), (some(7), some(5))), Branches(some(3), (some(4), some(6)))]
    scorer = WalkerScorer(structure, reader, tmp_path, kv_cache=cache)
    found = scorer.score(items).branch_logprobs([0, 1])
    for item, sums in zip(items, found, strict=True):
        for tokens, total in zip(item.continuations, sums.tolist(), strict=True):
            whole = torch.cat([item.context, tokens])
            logits = scorer.score([whole]).logits(0, len(item.context) - 1, len(whole) - 1)
            logprobs = torch.log_softmax(logits, -1).gather(1, tokens[:, None])
            assert total == pytest.approx(float(logprobs.sum()), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache": {"kind": "int3"}}, r"kv_cache\.kind"),
        ({"kv_cache": {"kind": "int8", "windw": 3}}, r"unknown key 'kv_cache\.windw'"),
        ({"kv_cache": {"kind": "int4", "page_sise": 3}}, r"did you mean 'page_size'"),
        ({"kv_cache": {"kind": "int8", "page_size": 48}}, r"kv_cache\.page_size"),
        ({"kv_cache": {"kind": "int4", "recent_window": 0}}, r"kv_cache\.recent_window"),
        ({"kv_cache": {"kind": "fp8", "recent_window": 64}}, "fp8 has no window in 16 bit"),
        (
            {"kv_cache": {"kind": "fp8"}, "output": {"format": "gptq", "consumers": []}},
            "no place for the scales",
        ),
        (
            {
                "kv_cache": {"kind": "int8"},
                "stages": [{"kind": "quantize", "scheme": {"type": "Q4_K"}}],
                "output": {"format": "gguf"},
            },
            "llama.cpp takes it from its command line",
        ),
    ],
)
def test_a_section_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    data = {"name": "x", "stages": [{"kind": "quantize"}], **changes}
    with pytest.raises(BadInputError, match=message):
        parse_recipe(data)


def test_a_16_bit_cache_is_none_to_judge_or_record() -> None:
    plain = parse_recipe({"name": "x", "stages": [{"solver": "rtn"}], "kv_cache": {"kind": "bf16"}})
    assert plain.quantized_cache is None and not plain.calibrates and plain.is_plain_rounding
    scaled = parse_recipe({"name": "x", "stages": [{"solver": "rtn"}], "kv_cache": {"kind": "fp8"}})
    assert scaled.calibrates and scaled.is_plain_rounding


@pytest.mark.parametrize("context", [128, 382])
def test_a_window_that_leaves_nothing_to_quantize_is_refused(
    text: Path, tmp_path: Path, context: int
) -> None:
    short = write_job(tmp_path, max_position_embeddings=context)
    with pytest.raises(ContractError, match=f"positions that a context of {context} is judged on"):
        quantize(short, recipe(text, {"kind": "int4"}), tmp_path / "out")


def test_contexts_too_short_for_the_window_are_refused_before_the_work(
    source: Path, text: Path, tmp_path: Path
) -> None:
    cache = {"kind": "int4", "page_size": 16, "recent_window": 64}  # first read of codes: 79
    with pytest.raises(BadInputError, match="positions before 79 read nothing quantized"):
        quantize(source, recipe(text, cache), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("planted", [float("nan"), float("inf")])
def test_keys_of_nan_are_not_lost_behind_the_next_batch(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: float
) -> None:
    def find(forwards: Any, dtype: torch.dtype) -> Any:
        """Over the one batch twice, the first time broken."""
        walker = forwards.walker

        def read(index: int) -> Tensor:
            return forwards.inputs.read(0) * (planted if index == 0 else 1.0)

        twice = SimpleNamespace(
            walker=SimpleNamespace(
                structure=walker.structure,
                forward=lambda block, module, _, hidden: walker.forward(block, module, 0, hidden),
            ),
            block=forwards.block,
            module=forwards.module,
            inputs=SimpleNamespace(num_batches=2, read=read),
        )
        return find_scales(twice, dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "find_scales", find)
    asked = recipe(text, {"kind": "fp8"}, calibration=CALIBRATION | {"source": str(text)})
    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn on batch 0 .* keys of NaN"):
        quantize(source, asked, tmp_path / "out")


@pytest.mark.parametrize("name", ["int4-gptq-kv-fp8", "int4-gptq-kv-int8"])
def test_recipes_differ_from_int4_gptq_in_their_cache_alone(name: str) -> None:
    ours, plain = load_recipe(name).model_dump(), load_recipe("int4-gptq").model_dump()
    differ = {key for key in ours if ours[key] != plain[key]}
    assert differ == {"name", "description", "kv_cache"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({CONFIG_KEY: {"schema_version": 9}}, "of no version"),
        ({CONFIG_KEY: {"schema_version": 1, "kind": "int4", "page_size": 7}}, "no cache that"),
        (
            {CONFIG_KEY: own_section(KVCacheSettings("int8"))},
            "says int8 and kv_cache_scheme says fp8",
        ),
        ({CONFIG_KEY: None}, None),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(
    change: dict[str, Any], message: str | None, fp8: tuple[Path, Report]
) -> None:
    config = {**json.loads((fp8[0] / "config.json").read_text()), **change}
    if message is None:
        assert read_settings(config) == KVCacheSettings("fp8")
        return
    with pytest.raises(BadInputError, match=message):
        read_settings(config)


def test_scales_that_are_missing_or_no_scales_are_refused(
    fp8: tuple[Path, Report], tmp_path: Path
) -> None:
    for value, message in ((None, "v_scale is missing"), (-1.0, r"v_scale is -1\.0")):
        broken = tmp_path / str(value)
        shutil.copytree(fp8[0], broken)
        name = "model.layers.2.self_attn.v_scale"
        file = open_checkpoint(broken).info(name).file
        tensors = load_file(file)
        del tensors[name]
        if value is not None:
            tensors[name] = torch.tensor([value])
        save_file(tensors, file, {"format": "pt"})
        if value is None:
            index = json.loads((broken / "model.safetensors.index.json").read_text())
            del index["weight_map"][name]
            (broken / "model.safetensors.index.json").write_text(json.dumps(index))
        reader = open_checkpoint(broken)
        structure = read_structure(DequantizedSource(reader))
        with pytest.raises(BadInputError, match=message):
            read_cache(reader.config, reader, structure)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_scale_is_rounded_up_so_that_the_largest_value_fits(dtype: torch.dtype) -> None:
    for largest in (0.3, 1.0, 5.1234567, 977.0):
        scale = scale_tensor(largest, dtype)
        assert scale.dtype == dtype and scale.shape == (1,)
        assert largest <= 448 * float(scale) <= largest * 1.02
    assert float(scale_tensor(0.0, dtype)) == 1.0


def test_the_engine_takes_the_scales_of_the_checkpoint(fp8: tuple[Path, Report]) -> None:
    from llmopt.decoding.stored_cache import choose_cache

    output, report = fp8
    for choice in ("auto", "fp8"):
        config = choose_cache(choice, output)
        assert config.kind == "fp8" and config.fp8_scales is not None
        for record in report.cache_scales:
            scales = config.fp8_scales[record.block]
            assert scales.k == (record.k_scale,) * 2 and scales.v == (record.v_scale,) * 2
