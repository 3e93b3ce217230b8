"""A quantizer as a subprocess: what comes back, and what a broken one leaves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmopt.bench.measuring import Request, RunError, measure

FAKE = '''
"""A peer that answers at once."""
import os
PACKAGES = ("numpy",)
def quantize(request):
    held = bytearray(os.urandom(1)) * (64 << 20)
    total = sum(i * i for i in range(400_000))
    open(request["output"], "w").write(str(sum(map(sum, request["token_ids"]))))
    return {"quantize_s": 1.5, "notes": [os.environ["EXTRA"] + os.environ["OMP_NUM_THREADS"]]}
'''


def request(folder: Path) -> Request:
    """A question about two blocks of three tokens."""
    output = str(folder / "output")
    return Request("model", output, [[1, 2, 3], [4, 5, 6]], "gptq", 4, 128, True, threads=1)


def fake_runners(folder: Path, source: str) -> Path:
    runners = folder / "runners"
    runners.mkdir()
    (runners / "run_fake.py").write_text(source, "utf-8")
    return runners


def test_a_run_tells_time_memory_versions_and_notes(tmp_path: Path) -> None:
    runners = fake_runners(tmp_path, FAKE)
    python = Path(sys.executable)
    run = measure(python, "run_fake", request(tmp_path), tmp_path, {"EXTRA": "x"}, runners)
    response = run.response
    assert (tmp_path / "output").read_text("utf-8") == "21"
    assert response.quantize_s == 1.5
    assert response.notes == ["x1"]
    assert set(response.versions) == {"numpy", "torch"}
    assert run.cpu_s > 0
    assert response.import_s < run.wall_s
    assert response.peak_rss_bytes - response.own_rss_bytes > 60 << 20
    assert run.peak_anonymous_bytes > response.own_anonymous_bytes > 0


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('no such kernel')", "no such kernel"),
        ("PACKAGES = ()\ndef quantize(request):\n    return {}", "cannot be read"),
        ("import os\nos._exit(0)", "status 0"),
    ],
)
def test_a_broken_quantizer_is_told_with_what_it_printed(
    tmp_path: Path, source: str, said: str
) -> None:
    runners = fake_runners(tmp_path, source)
    with pytest.raises(RunError, match=said):
        measure(Path(sys.executable), "run_fake", request(tmp_path), tmp_path, {}, runners)
