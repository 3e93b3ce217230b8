"""Where a run happens: what the report says of it, and what a resume must find again."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

import llmopt
from llmopt.errors import BadInputError
from llmopt.report.schema import Environment


def check_device(device: str) -> str:
    """The device, if it is there.

    Raises:
        BadInputError: unknown, or not on this machine.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise BadInputError(f"unknown device {device!r}", "use cpu, cuda or cuda:N") from error
    if kind not in ("cpu", "cuda"):
        raise BadInputError(f"device {device!r} is not supported", "use cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadInputError("this machine has no CUDA device that torch sees", "use --device cpu")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise BadInputError(f"there is no {device}: torch sees {count} devices", "use cuda:0")
    return device


def describe_environment(device: str, dtype: torch.dtype) -> Environment:
    """Versions, device, threads and the calibration pass's element type."""
    return Environment(
        python=platform.python_version(),
        llmopt=llmopt.__version__,
        torch=str(torch.__version__),
        transformers=version("transformers"),
        device=_device_name(device),
        num_threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        platform=platform.platform(),
    )


def fingerprint(environment: Environment, **contents: str) -> dict[str, str]:
    """What must be equal for a resume to give the same bytes."""
    fixed = ("llmopt", "torch", "transformers", "device", "num_threads", "dtype")
    return {**{key: str(getattr(environment, key)) for key in fixed}, **contents}


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
            return f"cpu: {next(names, platform.machine())}"
    except OSError:  # not Linux
        return f"cpu: {platform.processor() or platform.machine()}"
