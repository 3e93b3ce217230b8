"""The whole road in a process of its own: seconds, memory by step, the verdict."""

from __future__ import annotations

import json
import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.small_jobs import small_recipe, write_job, write_text

from llmopt.bench.measuring import RunError
from llmopt.bench.road import RoadReport, bench_road, road_markdown
from llmopt.bench.runners.run_road import StepPeaks
from llmopt.bench.runners.session import memory_bytes
from llmopt.errors import BadInputError

MIB = 1 << 20


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny checkpoint and a recipe for it."""
    folder = tmp_path_factory.mktemp("road")
    source = write_job(folder)
    recipe = folder / "small.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(write_text(folder)).model_dump(mode="json")))
    return source, recipe


@pytest.fixture(scope="module")
def report(job: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RoadReport:
    """One run, its file beside it."""
    output = tmp_path_factory.mktemp("out") / "road.json"
    source, recipe = job
    made = bench_road(source, output, recipe=str(recipe), num_samples=4, length=32, threads=1)
    written = json.loads(output.read_text())
    assert written["run"]["response"]["peaks_bytes"] == made.run.response.peaks_bytes
    return made


def test_it_tells_seconds_by_stage_and_memory_by_step(report: RoadReport) -> None:
    response = report.run.response
    assert {"quantize", "round trip", "gate"} <= set(response.phases_s)
    assert {"quantize", "read back"} <= set(response.peaks_bytes)
    assert sum(response.phases_s.values()) <= response.quantize_s <= report.run.wall_s
    assert max(response.peaks_bytes.values()) > response.own_anonymous_bytes
    assert any("verdict pass" in note for note in response.notes)


def test_the_table_compares_with_the_bound(report: RoadReport) -> None:
    peaks = {"quantize": 300 * MIB}
    response = replace(report.run.response, own_anonymous_bytes=100 * MIB, peaks_bytes=peaks)
    run = replace(report.run, response=response, peak_anonymous_bytes=500 * MIB)
    table = road_markdown(replace(report, run=run, memory_bound_bytes=100 * MIB))
    assert "| quantize | 200 | 2.00 |" in table
    assert "| the whole road | 400 | 4.00 |" in table


def test_memory_counts_for_the_step_that_took_it() -> None:
    peaks = StepPeaks()
    with peaks.watching():
        peaks.enter("small", 0, 1)
        before = memory_bytes("RssAnon")
        peaks.enter("large", 0, 1)
        # Not from the heap, which may have as much to spare.
        with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
            held.write(bytes(64 * MIB))
            peaks.enter("large", 1, 1)
        peaks.enter("after", 0, 1)
    assert peaks.bytes["large"] >= before + 60 * MIB
    assert peaks.bytes["after"] <= peaks.bytes["large"] - 60 * MIB


def test_a_road_that_breaks_is_told_and_leaves_no_file(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "road.json"
    with pytest.raises(RunError, match="context"):
        bench_road(job[0], output, recipe=str(job[1]), num_samples=1, length=1_000_000, threads=1)
    assert not output.exists()


def test_an_output_that_exists_is_refused_before_work(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "road.json"
    output.touch()
    with pytest.raises(BadInputError, match="exists"):
        bench_road(job[0], output, recipe=str(job[1]), num_samples=1, length=16, threads=1)
