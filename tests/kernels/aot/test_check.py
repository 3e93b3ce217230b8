"""The ahead-of-time check as CI runs it."""

import subprocess
import sys
from pathlib import Path

import llmopt_kernels

CHECK = Path(llmopt_kernels.__file__).parents[1] / "aot" / "check.py"


def test_kernels_without_a_fault_fail_over_the_budget(tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(CHECK), "rope", "--chip", "90", "--cpu-budget", "0.5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "3 kernels, 0 with faults" in done.stdout, done.stderr
    assert "more than the budget of 0.5 s" in done.stdout
    assert done.returncode == 1
