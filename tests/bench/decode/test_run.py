"""The whole benchmark with engines that compute nothing, in processes of their own."""

from __future__ import annotations

import importlib
import json
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.small_jobs import write_job

from llmopt.bench.decode import run as running
from llmopt.bench.decode.break_even import sentences
from llmopt.bench.decode.engines import Entry, plan_entries
from llmopt.bench.decode.measuring import hear
from llmopt.bench.decode.run import DecodeOptions, bench_decode
from llmopt.bench.decode.traffic import Bandwidth
from llmopt.bench.decode.workloads import MIXED
from llmopt.bench.measuring import RunError
from llmopt.bench.runners import decode_llmopt
from llmopt.errors import BadInputError

ENGINE = """
import sys, time

PACKAGES = ()

class Engine:
    notes = ("a toy",)
    seen = set()
    def __init__(self, request):
        self.request = request
    def run(self, prompts, new_tokens):
        if tuple(map(tuple, prompts)) in Engine.seen:
            raise ValueError("a cache of prefixes would know these prompts")
        Engine.seen.add(tuple(map(tuple, prompts)))
        if self.request["variant"] == "dies" and len(prompts) == 2:
            sys.exit(7)
        if self.request["variant"] == "refuses" and len(prompts) == 2:
            raise ValueError("two are too many")
        tokens = [[(p[-1] + i) % 97 for i in range(n)] for p, n in zip(prompts, new_tokens)]
        if self.request["variant"] == "differs":
            tokens[0][3] += 1
        step = 0.01 * len(prompts) / (2 if self.request["kv"] == "int8" else 1)
        return tokens, [[step * (i + 1) for i in range(n)] for n in new_tokens]
    def gaps(self, prompts, tokens):
        return [[0.25] * len(row) for row in tokens]
    def noise(self, prompts, tokens):
        return 0.2 if self.request["variant"] == "quiet" else 0.3

open_engine = Engine
"""


@pytest.fixture
def runners(tmp_path: Path) -> Path:
    folder = tmp_path / "runners"
    folder.mkdir()
    (folder / "toy_engine.py").write_text(textwrap.dedent(ENGINE))
    return folder


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stream = [place % 500 for place in range(20_000)]
    monkeypatch.setattr(running, "token_stream", lambda _model: stream)
    monkeypatch.setattr(running, "measure_bandwidth", lambda *_: Bandwidth(1e9, "nothing", 1))
    return write_job(tmp_path, max_position_embeddings=512)


def options(source: Path, runners: Path, *entries: Entry) -> DecodeOptions:
    return DecodeOptions(
        model=source,
        output=source.parent / "out",
        entries=entries,
        batches=(1, 2),
        contexts=(16,),
        new_tokens=8,
        repeats=2,
        threads=1,
        runners=runners,
    )


REFERENCE = Entry("transformers", "toy_engine", "16-bit", variant="dynamic")


def test_rows_follow_what_the_engines_answer(source: Path, runners: Path) -> None:
    report = bench_decode(
        options(
            source,
            runners,
            REFERENCE,
            Entry("llmopt", "toy_engine", "16-bit", reference="16-bit"),
            Entry("llmopt", "toy_engine", "16-bit", "int8", reference="16-bit"),
            Entry("other", "toy_engine", "16-bit", variant="differs", reference="16-bit"),
        )
    )
    assert report.complete
    rows = {(row.engine, row.kv, row.workload): row for row in report.rows}
    assert len(rows) == 4 * 3
    single = rows["llmopt", "16-bit", "1x16"]
    assert single.rate == pytest.approx(100)
    assert rows["llmopt", "16-bit", "2x16"].rate == pytest.approx(100)
    assert rows["llmopt", "int8", "1x16"].rate == pytest.approx(200)
    assert single.repeats == 2
    assert single.notes == ("a toy",)
    assert single.floor_tokens_per_s is not None and single.step_bytes is not None
    # The weights in bfloat16, and keys and values of 20 tokens in 3 layers, 2 heads of 8.
    cache = 20 * 3 * 2 * 2 * 8 * 2
    assert single.step_bytes - cache == (source / "model.safetensors").stat().st_size // 2 * 2 - (
        _other_bytes(source)
    )
    assert single.floor_tokens_per_s == pytest.approx(1e9 / single.step_bytes)
    assert str(single.agreement) == "4/4 identical"
    other = rows["other", "16-bit", MIXED].agreement
    assert other is not None and (other.identical, other.first_difference) == (3, 3)
    assert other.largest_gap == 0.25
    assert rows["transformers", "16-bit", MIXED].agreement is None
    out = source.parent / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "decode.html",
        "decode.json",
        "decode.md",
    ]
    assert json.loads((out / "decode.json").read_text())["complete"]


def _other_bytes(source: Path) -> int:
    """Of the file, what is header or the embedding, which no step reads."""
    raw = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    start, end = header["model.embed_tokens.weight"]["data_offsets"]
    return 8 + length + end - start


@pytest.mark.parametrize(
    ("variant", "said"), [("dies", "status 7"), ("refuses", "ValueError: two are too many")]
)
def test_an_engine_that_breaks_keeps_what_it_had_measured(
    source: Path, runners: Path, variant: str, said: str
) -> None:
    entry = Entry("other", "toy_engine", "16-bit", variant=variant)
    report = bench_decode(options(source, runners, entry))
    by_name = {row.workload: row for row in report.rows}
    assert by_name["1x16"].status == "measured"
    assert by_name["2x16"].status == "failed"
    assert said in by_name["2x16"].reason
    assert by_name[MIXED].status == ("failed" if variant == "dies" else "measured")


def test_an_engine_without_its_environment_is_unavailable(
    source: Path, runners: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(source.parent))
    entry = Entry("vllm", "toy_engine", "16-bit", environment="vllm", is_built_on_demand=False)
    report = bench_decode(options(source, runners, entry))
    assert {row.status for row in report.rows} == {"unavailable"}
    assert "there is no environment" in report.rows[0].reason


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize(
    ("check", "said"),
    [
        ("raise SystemExit(3)", "other is built for the CPU alone"),
        ("import nothing_like_it", "cannot tell whether it computes on cuda"),
    ],
)
def test_an_engine_built_for_the_cpu_has_no_rows_of_a_gpu(
    source: Path,
    runners: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    check: str,
    said: str,
) -> None:
    monkeypatch.setattr(running, "_machine", lambda device: f"a {device.type}")
    entry = Entry("other", "toy_engine", "16-bit", gpu_check=check)
    report = bench_decode(replace(options(source, runners, entry), device=device))
    assert {row.status for row in report.rows} == {"unavailable"}
    assert all(said in row.reason for row in report.rows)
    assert report.setting.machine == "a cuda"


@pytest.mark.parametrize(("variant", "is_failed"), [("quiet", True), ("dynamic", False)])
def test_plain_rows_of_ours_with_other_tokens_than_noise_explains_are_failed(
    source: Path, runners: Path, variant: str, is_failed: bool
) -> None:
    report = bench_decode(
        options(
            source,
            runners,
            Entry("transformers", "toy_engine", "16-bit", variant=variant),
            Entry("llmopt", "toy_engine", "16-bit", variant="differs", reference="16-bit"),
            Entry("llmopt", "toy_engine", "16-bit", "int8", "differs", reference="16-bit"),
            Entry("other", "toy_engine", "16-bit", variant="differs", reference="16-bit"),
        )
    )
    status = {(row.engine, row.kv): row.status for row in report.rows}
    assert status["llmopt", "16-bit"] == ("failed" if is_failed else "measured")
    assert status["llmopt", "int8"] == status["other", "16-bit"] == "measured"
    lines = [line for line in sentences(report) if "int8 cache" in line or "llmopt at" in line]
    assert bool(lines) != is_failed
    if is_failed:
        row = next(row for row in report.rows if row.status == "failed")
        assert "moves a lead by 0.200" in row.reason and "at most 0.250" in row.reason


def test_a_check_of_the_gpu_is_no_matter_on_a_cpu(source: Path, runners: Path) -> None:
    entry = Entry("other", "toy_engine", "16-bit", gpu_check="raise SystemExit(3)")
    report = bench_decode(options(source, runners, entry))
    assert {row.status for row in report.rows} == {"measured"}


def test_peers_that_are_built_for_the_cpu_are_asked() -> None:
    for entry in plan_entries(["16-bit"], ["16-bit"], ["llama.cpp", "vllm"], ["BF16"]):
        assert bool(entry.gpu_check) == (entry.engine in ("llama.cpp", "vllm"))


def test_memory_is_the_gpus_by_any_of_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(decode_llmopt.__file__).parent))
    session = importlib.import_module("decode_session")
    monkeypatch.setattr(session, "memory_bytes", lambda name: name)
    for device in ("cuda", "cuda:0"):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 42)
        assert session._peak_bytes(device) == 42


def test_the_floor_is_of_the_element_type_that_engines_compute_in(
    source: Path, runners: Path
) -> None:
    entry = Entry("llmopt", "toy_engine", "16-bit", "int8")
    files = Entry("llama.cpp", "toy_engine", "F32")
    found = {}
    for dtype in ("bfloat16", "float32"):
        asked = replace(
            options(source, runners, REFERENCE, entry, files),
            dtype=dtype,
            output=source.parent / dtype,
        )
        for row in bench_decode(asked).rows:
            if row.context is not None:
                found[row.engine, row.workload, dtype] = row.step_bytes
    plain = [found["transformers", "1x16", dtype] for dtype in ("bfloat16", "float32")]
    assert plain[1] == 2 * plain[0]
    int8 = [found["llmopt", "1x16", dtype] for dtype in ("bfloat16", "float32")]
    cache = 20 * 3 * 2 * 2 * (8 + 4)
    assert int8[1] - cache == 2 * (int8[0] - cache)
    assert found["llama.cpp", "1x16", "bfloat16"] == found["llama.cpp", "1x16", "float32"]


def test_a_context_that_the_model_was_not_made_for_is_refused(source: Path, runners: Path) -> None:
    asked = options(source, runners, REFERENCE)
    with pytest.raises(BadInputError, match="--grown"):
        bench_decode(DecodeOptions(asked.model, asked.output, (REFERENCE,), contexts=(600,)))


def test_lines_that_cannot_be_read_are_an_error_and_a_cut_one_is_not() -> None:
    opened = json.dumps({"load_s": 1.0, "own_rss_bytes": 1, "versions": {}})
    heard = hear(f'{opened}\n{{"name": "1x16"}}\n{{"name": "2x', "toy")
    assert list(heard.answers) == ["1x16"]
    with pytest.raises(RunError, match="cannot be read"):
        hear(f"{opened}\nnoise\n", "toy")
