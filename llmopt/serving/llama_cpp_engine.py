"""llama.cpp in this process, by llama-cpp-python's low-level interface (``llama.h``)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llmopt.errors import BadInputError
from llmopt.formats.gguf.file import GGUFFile
from llmopt.serving.llama_cpp import check_installed
from llmopt.serving.processors import physical_cores

_BATCH = 512  # tokens that llama.cpp takes at a time, and logits that it keeps
_CONTEXT_STEP = 256
_FLOAT32 = 0  # ggml's number
_ERROR = 4  # GGML_LOG_LEVEL_ERROR


@dataclass(frozen=True, slots=True)
class Step:
    """One token for the engine.

    Attributes:
        token: its id.
        position: in its sequence.
        sequence: which one; 0 is what others are shared from.
        wanted: whether its logits are.
    """

    token: int
    position: int
    sequence: int
    wanted: bool


class Engine(Protocol):
    """What the scorer asks of an engine with a cache of keys and values."""

    @property
    def context_length(self) -> int:
        """Tokens that the model was made for."""
        ...

    def reserve(self, num_tokens: int, num_sequences: int) -> None:
        """Make room for as much; what is in the cache may go."""
        ...

    def clear(self) -> None:
        """Empty the cache."""
        ...

    def share(self, sequence: int) -> None:
        """Let a sequence begin with all that sequence 0 holds."""
        ...

    def decode(self, steps: Sequence[Step]) -> Tensor:
        """Compute tokens; ``(wanted, vocabulary) float32``, in the order of the steps."""
        ...


class LlamaCppEngine:
    """A GGUF file in llama.cpp, computing on the CPU as it is served.

    Args:
        path: the file.
        threads: that compute; the physical cores without a number.
        exact: keep keys and values in float32 and do without flash attention, to compare with what
            other programs compute; else in 16 bit, as the server does.

    Raises:
        BadInputError: llama-cpp-python is not installed, or the file cannot be loaded.
    """

    def __init__(self, path: Path, *, threads: int | None = None, exact: bool = False) -> None:
        check_installed(("llama_cpp",))
        GGUFFile(path)  # a damaged file is refused here: llama.cpp may end the process
        import llama_cpp

        self._api = llama_cpp
        self._path = path
        self._threads = physical_cores() if threads is None else threads
        self._exact = exact
        self._context: Any = None
        self._room = (0, 0)
        self._complaints: list[str] = []
        # C code is told its address, so it lives until another takes its place (see close).
        self._tell = llama_cpp.llama_log_callback(self._listen)
        llama_cpp.llama_log_set(self._tell, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            self.close()
            raise self._failed("load it")
        self._vocabulary: int = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )

    @property
    def context_length(self) -> int:
        """Tokens that the model was made for."""
        length: int = self._api.llama_model_n_ctx_train(self._model)
        return length

    def reserve(self, num_tokens: int, num_sequences: int) -> None:
        """Make room for as much; what is in the cache may go."""
        if num_tokens <= self._room[0] and num_sequences <= self._room[1]:
            return
        api = self._api
        self._release_context()
        length = -(-num_tokens // _CONTEXT_STEP) * _CONTEXT_STEP
        parameters = api.llama_context_default_params()
        parameters.n_ctx = length
        parameters.n_batch = parameters.n_ubatch = _BATCH
        parameters.n_seq_max = num_sequences
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.kv_unified = True  # sequences share what they begin with
        parameters.swa_full = True  # a window's cache forgets what a shared sequence still needs
        parameters.no_perf = True
        if self._exact:
            parameters.type_k = parameters.type_v = _FLOAT32
            parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise self._failed(f"make room for {length} tokens")
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(_BATCH, 0, 1)
        self._room = (length, num_sequences)

    def clear(self) -> None:
        """Empty the cache."""
        self._api.llama_memory_clear(self._memory, True)

    def share(self, sequence: int) -> None:
        """Let a sequence begin with all that sequence 0 holds."""
        self._api.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)

    def decode(self, steps: Sequence[Step]) -> Tensor:
        """Compute tokens; ``(wanted, vocabulary) float32``, in the order of the steps."""
        parts = [
            self._decode(steps[first : first + _BATCH]) for first in range(0, len(steps), _BATCH)
        ]
        return torch.cat(parts) if parts else torch.empty(0, self._vocabulary)

    def close(self) -> None:
        """Give back all memory."""
        self._release_context()
        if self._model:
            self._api.llama_model_free(self._model)
            self._model = None
        self._api.llama_log_set(self._api.llama_log_callback(), ctypes.c_void_p(0))

    def _decode(self, steps: Sequence[Step]) -> Tensor:
        batch = self._batch
        batch.n_tokens = len(steps)
        for index, step in enumerate(steps):
            batch.token[index] = step.token
            batch.pos[index] = step.position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = step.sequence
            batch.logits[index] = step.wanted
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise self._failed(f"compute (status {status})")
        num_wanted = sum(step.wanted for step in steps)
        if not num_wanted:
            return torch.empty(0, self._vocabulary)
        found = self._api.llama_get_logits(self._context)
        rows = np.ctypeslib.as_array(found, shape=(num_wanted, self._vocabulary))
        return torch.from_numpy(rows.copy())

    def _release_context(self) -> None:
        if self._context:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._context)
            self._context, self._room = None, (0, 0)

    def _listen(self, level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            self._complaints.append(text.decode(errors="replace").strip())

    def _failed(self, what: str) -> BadInputError:
        said = "; ".join(self._complaints[-3:]) or "it does not say why"
        return BadInputError(
            f"llama.cpp could not {what}: {self._path} ({said})",
            "check that the installed llama-cpp-python knows this architecture, and the memory",
        )


@contextmanager
def open_engine(
    path: Path, *, threads: int | None = None, exact: bool = False
) -> Iterator[LlamaCppEngine]:
    """A file in llama.cpp, whose memory is given back at the end; arguments as the class's."""
    engine = LlamaCppEngine(path, threads=threads, exact=exact)
    try:
        yield engine
    finally:
        engine.close()
