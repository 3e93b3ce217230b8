"""What holds for every test: no network, few threads, examples that do not change between runs.

Without a GPU, triton's kernels run in its interpreter, which must be asked for before triton is
imported.
"""

import os
from pathlib import Path

# A worker of pytest-xdist has a core to itself.
THREADS = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"

# Read when the libraries are imported, hence before the imports below.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS=THREADS,
)

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(int(THREADS))
settings.register_profile("llmopt", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("llmopt")

LONGEST = ("test_wheel", "test_resume", "test_memory", "test_planted_faults", "test_bad_input")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no process waits for one test at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)
