"""What holds for every test: no network, two threads, examples that do not change between runs.

Without a GPU, triton's kernels run in its interpreter, which must be asked for before triton is
imported.
"""

import os
from pathlib import Path

# Read when the libraries are imported, hence before the imports below.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="2",
)

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(2)
settings.register_profile("llmopt", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("llmopt")
