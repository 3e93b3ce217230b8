"""triton where it is installed; elsewhere a stand-in that lets kernels be defined, not launched.

torch's CPU builds come without triton, and llmopt must import there: an operation's file defines
its reference and its kernel side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Missing:
        """Takes any attribute and decorates any function; refuses to run."""

        def __getattr__(self, name: str) -> Any:
            if name == "jit":
                return _decorate
            return _Missing()

        def __getitem__(self, grid: object) -> Any:
            raise ModuleNotFoundError("this kernel needs triton: pip install triton")

        def __call__(self, *_: object, **__: object) -> Any:
            raise ModuleNotFoundError("this kernel needs triton: pip install triton")

    def _decorate(function: Callable[..., Any] | None = None, **_: object) -> Any:
        return _decorate if function is None else _Missing()

    triton: Any = _Missing()  # type: ignore[no-redef]
    tl: Any = _Missing()  # type: ignore[no-redef]

__all__ = ["tl", "triton"]
