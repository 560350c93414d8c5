"""llama.cpp, through the C interface that llama-cpp-python wraps."""

from __future__ import annotations

import ctypes
import platform
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np

from peers.model import ModelWorker, random_tokens

_LARGEST_BATCH = 2048  # tokens of one llama_decode; its own default


def versions() -> dict[str, str]:
    """The package's, with what it was compiled for."""
    features = llama_cpp.llama_print_system_info().decode()
    enabled = [part.split("=")[0].split(":")[-1].strip() for part in features.split("|") if part.endswith("= 1 ")]
    return {
        "llama-cpp-python": f"{version('llama_cpp_python')} ({', '.join(enabled)})",
        "python": platform.python_version(),
    }


@llama_cpp.llama_log_callback
def _ignore(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Drops llama.cpp's log."""


class LlamaCpp(ModelWorker):
    def __init__(self) -> None:
        llama_cpp.llama_log_set(_ignore, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._context = None

    def versions(self) -> dict[str, str]:
        return versions()

    def quantize(self, source: str, target: str, kind: str) -> None:
        """Writes a GGUF file with llama.cpp's own quantizer; tensors that are of the kind already stay as they are."""
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
        if code:
            raise RuntimeError(f"llama.cpp's quantizer returned {code}")

    def _open(self, path: str, **options: Any) -> None:
        self.release()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the file")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def close(self) -> None:
        """Frees the model, so that another can be opened."""
        self.release()
        llama_cpp.llama_model_free(self._model)

    def _logits(self, tokens: list[int]) -> np.ndarray:
        self._new_context(1, len(tokens), 1)
        self._feed([(token, i, 0, True) for i, token in enumerate(tokens)])
        return np.stack([self._row(i) for i in range(len(tokens))])

    def _fill(self, batch: int, depth: int, room: int, threads: int) -> None:
        self._new_context(batch, depth + room, threads)
        self._depth = depth
        self._tokens, self._positions = [0] * batch, [depth] * batch
        self._read_prompt(depth)
        for sequence in range(1, batch):
            llama_cpp.llama_memory_seq_cp(self._cache, 0, sequence, -1, -1)

    def _step(self) -> None:
        batch = range(len(self._tokens))
        self._feed([(self._tokens[i], self._positions[i], i, True) for i in batch])
        self._tokens = [int(self._row(i).argmax()) for i in batch]
        self._positions = [position + 1 for position in self._positions]

    def _rewind(self) -> None:
        for sequence in range(len(self._tokens)):
            llama_cpp.llama_memory_seq_rm(self._cache, sequence, self._depth, -1)
        self._positions = [self._depth] * len(self._tokens)

    def _read(self, tokens: int, threads: int) -> None:
        if self._shape != (1, tokens, threads):
            self._new_context(1, tokens, threads)
        llama_cpp.llama_memory_clear(self._cache, False)
        self._read_prompt(tokens)
        self._row(-1).argmax()

    def release(self) -> None:
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        self._context = None
        self._shape: tuple[int, int, int] | None = None

    def _new_context(self, batch: int, length: int, threads: int) -> None:
        """A context with room for `length` tokens of each of `batch` sequences, every one with a cache of its own."""
        self.release()
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_seq_max = batch
        parameters.n_ctx = batch * -(-length // 256) * 256
        parameters.n_batch = _LARGEST_BATCH
        parameters.kv_unified = False
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {batch} sequences of {length} tokens")
        self._cache = llama_cpp.llama_get_memory(self._context)
        self._shape = (batch, length, threads)

    def _read_prompt(self, tokens: int) -> None:
        prompt = random_tokens(tokens, self._vocabulary)
        for start in range(0, tokens, _LARGEST_BATCH):
            part = range(start, min(start + _LARGEST_BATCH, tokens))
            self._feed([(prompt[i], i, 0, i == tokens - 1) for i in part])

    def _feed(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Decodes tokens given as (token, position, sequence, whether its logits are wanted)."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, (token, position, sequence, wanted) in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            code = llama_cpp.llama_decode(self._context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def _row(self, index: int) -> np.ndarray:
        """A copy of the logits of a token of the last batch."""
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).copy()
