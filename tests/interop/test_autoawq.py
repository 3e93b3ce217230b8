"""AutoAWQ's own decoder reads our AWQ files to the bit.

It opens models only where Intel's extension for PyTorch is installed, so its decoder stands for it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from interop.protocol import CONSUMERS_FOLDER
from interop.test_consumer_table import FOUR_BITS, Case, Checkpoints, installed_versions
from safetensors.torch import load_file

from llmopt.bench.environments import clean_variables
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.formats.consumers import load_consumers
from llmopt.formats.dequantized import DequantizedSource

pytestmark = [pytest.mark.interop, pytest.mark.parametrize("python", ["archived"], indirect=True)]


def test_it_decodes_every_scheme_that_the_table_says_it_takes(python: Path, tmp_path: Path) -> None:
    support = load_consumers()["autoawq"].formats["awq"]
    schemes = [scheme for scheme in FOUR_BITS if support.proven(scheme)]
    assert schemes
    written = Checkpoints(tmp_path)
    check_decoded(python, [written.quantized("awq", Case(scheme)) for scheme in schemes], tmp_path)


def test_it_decodes_what_the_command_line_published(
    python: Path, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    check_decoded(python, [quantized("w4a16-awq-file")], tmp_path)


def test_the_table_speaks_of_the_version_that_is_run(python: Path) -> None:
    said = load_consumers()["autoawq"].formats["awq"].versions
    assert said == installed_versions(python, said)


def check_decoded(python: Path, directories: Sequence[Path], folder: Path) -> None:
    """Hold AutoAWQ's weights against ours, rounded as it rounds: once, to the scales' type."""
    request = folder / "request.json"
    files = {str(d): str(folder / f"{index}.safetensors") for index, d in enumerate(directories)}
    request.write_text(json.dumps(files), "utf-8")
    done = subprocess.run(
        [str(python), str(CONSUMERS_FOLDER / "decode_with_autoawq.py"), str(request)],
        cwd=folder,
        env=clean_variables(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for directory, file in files.items():
        source = DequantizedSource(open_checkpoint(Path(directory)))
        decoded = load_file(file)
        assert decoded.keys() == set(source.quantized_modules)
        for module, theirs in decoded.items():
            ours = source.read_quantized(module)
            assert torch.equal(theirs, ours.dequantize(ours.scales.dtype)), (directory, module)
