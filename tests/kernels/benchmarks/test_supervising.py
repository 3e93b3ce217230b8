"""A process that a kernel brings down costs one benchmark, not the run."""

import sys
import time
from dataclasses import asdict

import pytest
from support.kernels_benchmarks import CEILINGS, ENVIRONMENT, double

from benchmarks.supervising import supervise

WORKER = """
import json, os, sys, time
path, faults = sys.argv[1], json.loads(sys.argv[2])
lines = open(path).read().splitlines() if os.path.exists(path) else []
began = [json.loads(line).get("key") for line in lines]
file = open(path, "a", buffering=1)
def write(**event):
    file.write(json.dumps(event) + "\\n")
if not lines:
    if faults.get("start"):
        sys.exit("no driver")
    write(event="start", **json.loads(sys.argv[3]))
if len(lines) > 1 and "cannot start again" in faults.values():
    sys.exit("no driver")
for key in ("op/a", "op/b", "op/c"):
    if key in began:
        continue
    write(event="began", key=key)
    fault = faults.get(key)
    if fault == "dies":
        print("CUDA error: an illegal memory access", file=sys.stderr)
        os._exit(7)
    if fault == "cannot start again":
        os._exit(7)
    if fault == "hangs":
        time.sleep(60)
    write(event="ended", key=key)
"""
PROBLEMS = [double("a"), double("b"), double("c")]


def run(tmp_path, faults, **options):
    import json

    start = json.dumps({"environment": asdict(ENVIRONMENT), "ceilings": asdict(CEILINGS)})
    path = tmp_path / "journal"
    command = [sys.executable, "-c", WORKER, str(path), json.dumps(faults), start]
    seen = []
    options = {"stall_s": 20.0, "poll_s": 0.02, **options}
    deadline = time.time() + 60
    journal = supervise(command, PROBLEMS, path, deadline, lambda j: seen.append(j), **options)
    return journal, seen


def test_a_run_without_faults(tmp_path):
    journal, seen = run(tmp_path, {})
    assert journal.ended == ["op/a", "op/b", "op/c"] and not journal.rows


def test_the_run_goes_on_behind_a_crash(tmp_path):
    journal, seen = run(tmp_path, {"op/b": "dies"})
    assert journal.began == ["op/a", "op/b", "op/c"] == sorted(journal.ended)
    (row,) = journal.rows
    assert (row.benchmark, row.status) == ("b", "failed")
    assert row.reason == ("the process ended with status 7: CUDA error: an illegal memory access")
    assert seen


def test_the_run_goes_on_behind_a_kernel_that_hangs(tmp_path):
    journal, _ = run(tmp_path, {"op/c": "hangs"}, stall_s=4.0)
    (row,) = journal.rows
    assert (row.benchmark, row.reason) == ("c", "hung: nothing new for 4 s")


def test_a_process_that_cannot_start_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="nothing was measured: .*status 1: no driver"):
        run(tmp_path, {"start": "fails"})


def test_what_is_never_reached_is_listed(tmp_path):
    journal, _ = run(tmp_path, {"op/b": "cannot start again"})
    assert [(r.benchmark, r.status) for r in journal.rows] == [("b", "failed"), ("c", "left out")]
    assert journal.rows[1].reason == "not reached: the process ended with status 1: no driver"
