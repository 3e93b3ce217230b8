"""The command: refuses without a GPU, and goes from arguments to files with one that is played."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.kernels_benchmarks import CEILINGS, ENVIRONMENT, row

from benchmarks import run
from benchmarks.rows import from_json

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2():
    command = [sys.executable, str(ROOT / "kernels" / "benchmarks" / "run.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr == run.NO_GPU + "\n"


def test_an_unknown_operation_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--only", "roep"])
    assert "invalid choice: 'roep'" in capsys.readouterr().err


MACHINE = run.Machine(is_there=lambda: True, name=lambda: "NVIDIA H200")


@pytest.fixture
def played(monkeypatch):
    """Processes that compile and measure nothing, and rows that they bring."""
    rows = [row(operation="rope", benchmark="8192 tokens")]
    commands = []

    def supervise(command, benchmarks, path, deadline, on_progress):
        commands.append(command)
        journal = run.Journal.read(path)
        on_progress(journal)
        journal.start(ENVIRONMENT, CEILINGS)
        for each in rows:
            journal.add(each)
        on_progress(journal)
        return journal

    def warm(command, count, seconds):
        commands.append(command)
        return f"compiled ahead by {count} processes"

    monkeypatch.setattr(run, "supervise", supervise)
    monkeypatch.setattr(run, "warm_in_processes", warm)
    return rows, commands


def test_it_writes_the_report(played, tmp_path, capsys):
    rows, commands = played
    output = tmp_path / "new" / "found.json"
    options = ["--only", "rope", "--output", str(output), "--commit", "abc", "--compilers", "2"]
    assert run.main(options, MACHINE) == 0
    found = from_json(output.read_text())
    assert found.rows == tuple(rows)
    assert found.notes[1] == "compiled ahead by 2 processes"
    assert "8192 tokens" in capsys.readouterr().out
    assert [command[2:6] for command in commands] == [["--only", "rope", "--commit", "abc"]] * 2
    assert "--journal" in commands[1]


def test_from_the_command_to_the_file_with_a_kernel_that_brings_its_process_down(tmp_path):
    program = ROOT / "tests" / "support" / "played_benchmarks.py"
    output = tmp_path / "found.json"
    options = ["-o", str(output), "--commit", "abc", "--only", "quantize_rows", "--compilers", "1"]
    command = [sys.executable, str(program), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = json.loads(output.read_text())
    by_problem = {}
    for each in found["rows"]:
        by_problem.setdefault(each["benchmark"], []).append(each["status"])
    assert sorted(by_problem.values()) == [
        ["failed", "unavailable"],
        ["measured", "measured"],
        ["measured", "measured"],
    ]
    assert "the process ended with status 9" in json.dumps(found["rows"])
    assert found["environment"]["commit"] == "abc" and found["ceilings"]["copy"] > 0
    assert found["notes"][1].endswith("0 of 1 processes came to their end")
    assert "2.0000" in done.stdout and "written: " in done.stdout


def test_a_run_that_could_not_start_says_so(monkeypatch, played, tmp_path, capsys):
    def supervise(*_):
        raise RuntimeError("nothing was measured: no driver")

    monkeypatch.setattr(run, "supervise", supervise)
    assert run.main(["--only", "rope", "-o", str(tmp_path / "found.json")], MACHINE) == 1
    assert capsys.readouterr().err == "nothing was measured: no driver\n"


def test_a_failed_operation_of_ours_is_an_exit_status(played, tmp_path):
    rows, _ = played
    rows.append(row(operation="rope", status="failed", reason="wrong", p50_ms=None))
    assert run.main(["--only", "rope", "-o", str(tmp_path / "found.json")], MACHINE) == 1


def test_tuning_writes_winners_and_notes(played, tmp_path):
    rows, _ = played
    problem = next(b for b in run.suite.benchmarks(["linear_fp8"], "real") if b.tunable)
    rows[:] = [row(operation="linear_fp8", benchmark=problem.name)]
    output = tmp_path / "tuned.json"
    assert run.main(["--tune", "--only", "linear_fp8", "-o", str(output)], MACHINE) == 0
    (winner,) = json.loads(output.read_text())["winners"]
    assert winner["shipped"] == winner["fastest"] == str(problem.tunable.shipped)
    assert problem.name in output.with_suffix(".md").read_text()
