from __future__ import annotations

import subprocess
import sys


def test_the_room_is_there_with_llmopt_and_costs_nothing_until_used() -> None:
    program = (
        "import sys, llmopt; llmopt.decoding; assert 'torch' not in sys.modules;"
        "print(llmopt.decoding.SamplingParameters.__name__, llmopt.decoding.Engine.__module__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout == "SamplingParameters llmopt.decoding.engine\n"
