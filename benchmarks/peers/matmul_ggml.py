"""llama.cpp's matmul, through the C functions of the library inside llama-cpp-python."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp._ggml import libggml

from peers import q4
from peers.llamacpp import versions
from peers.matmul import COLD_ROWS, Kernel, MatmulWorker, copies_beyond, load_weight

_F32, _Q4_0, _Q4_1 = 0, 2, 3  # ggml_type
_CPU = 0  # ggml_backend_dev_type
_BUFFER_OFFSET = 8  # of ggml_tensor.buffer, behind the type
_ANY_ROWS = 512  # with which llama.cpp, too, asks whether a buffer takes a weight


class _Parameters(ctypes.Structure):
    _fields_ = [("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool)]


def _function(name: str, result: Any, *arguments: Any) -> Any:
    found = getattr(libggml, name)
    found.restype, found.argtypes = result, arguments
    return found


_init = _function("ggml_init", c_void_p, _Parameters)
_free = _function("ggml_free", None, c_void_p)
_tensor_overhead = _function("ggml_tensor_overhead", c_size_t)
_graph_overhead = _function("ggml_graph_overhead", c_size_t)
_new_tensor = _function("ggml_new_tensor_2d", c_void_p, c_void_p, c_int, c_int64, c_int64)
_mul_mat = _function("ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p)
_new_graph = _function("ggml_new_graph", c_void_p, c_void_p)
_expand = _function("ggml_build_forward_expand", None, c_void_p, c_void_p)
_device_of_type = _function("ggml_backend_dev_by_type", c_void_p, c_int)
_registry = _function("ggml_backend_dev_backend_reg", c_void_p, c_void_p)
_procedure = _function("ggml_backend_reg_get_proc_address", c_void_p, c_void_p, c_char_p)
_init_device = _function("ggml_backend_dev_init", c_void_p, c_void_p, c_char_p)
_default_buffers = _function("ggml_backend_dev_buffer_type", c_void_p, c_void_p)
_supports = _function("ggml_backend_dev_supports_op", c_bool, c_void_p, c_void_p)
_buffer_name = _function("ggml_backend_buft_name", c_char_p, c_void_p)
_new_buffer = _function("ggml_backend_buft_alloc_buffer", c_void_p, c_void_p, c_size_t)
_free_buffer = _function("ggml_backend_buffer_free", None, c_void_p)
_place_from = _function("ggml_backend_alloc_ctx_tensors_from_buft", c_void_p, c_void_p, c_void_p)
_place = _function("ggml_backend_alloc_ctx_tensors", c_void_p, c_void_p, c_void_p)
_set = _function("ggml_backend_tensor_set", None, c_void_p, c_void_p, c_size_t, c_size_t)
_get = _function("ggml_backend_tensor_get", None, c_void_p, c_void_p, c_size_t, c_size_t)
_compute = _function("ggml_backend_graph_compute", c_int, c_void_p, c_void_p)


class _Backend:
    """The CPU."""

    def __init__(self) -> None:
        self.device = _device_of_type(_CPU)
        self.handle = _init_device(self.device, None)
        self._procedures = _registry(self.device)

    def set_threads(self, threads: int) -> None:
        set_threads = ctypes.CFUNCTYPE(None, c_void_p, c_int)(self._address("ggml_backend_set_n_threads"))
        set_threads(self.handle, threads)

    def buffers(self, kind: int, in_features: int, out_features: int) -> int:
        """Where llama.cpp keeps a weight: the first kind of buffer with a matmul for it, or ordinary memory.

        The kinds rearrange a weight for their kernels (AMX, or blocks of rows).
        """
        for found in self._special_buffers():
            context = _context(3)
            weight = _new_tensor(context, kind, in_features, out_features)
            product = _mul_mat(context, weight, _new_tensor(context, _F32, in_features, _ANY_ROWS))
            buffer = _new_buffer(found, 0)
            c_void_p.from_address(weight + _BUFFER_OFFSET).value = buffer
            supported = _supports(self.device, product)
            _free_buffer(buffer)
            _free(context)
            if supported:
                return found
        return _default_buffers(self.device)

    def _special_buffers(self) -> Iterator[int]:
        address = self._address("ggml_backend_dev_get_extra_bufts")
        found = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.device)
        for i in range(100):
            if found[i] is None:
                return
            yield found[i]

    def _address(self, name: str) -> int:
        return _procedure(self._procedures, name.encode())


class _Product:
    """A graph that multiplies activations by weights, one after the other."""

    def __init__(self, backend: _Backend, weights: list[int], x: np.ndarray, out_features: int) -> None:
        self._backend, self._shape = backend, (len(x), out_features)
        self._context = _context(len(weights) + 1)
        activations = _new_tensor(self._context, _F32, x.shape[1], len(x))
        products = [_mul_mat(self._context, weight, activations) for weight in weights]
        self._graph, self._last = _new_graph(self._context), products[-1]
        for product in products:
            _expand(self._graph, product)
        self._buffer = _place(self._context, backend.handle)
        _set(activations, x.ctypes.data, 0, x.nbytes)

    def run(self) -> None:
        if _compute(self._backend.handle, self._graph):
            raise RuntimeError("ggml_backend_graph_compute failed")

    def output(self) -> np.ndarray:
        found = np.empty(self._shape, np.float32)
        _get(self._last, found.ctypes.data, 0, found.nbytes)
        return found

    def __del__(self) -> None:
        _free_buffer(self._buffer)
        _free(self._context)


class _GgmlKernel(Kernel):
    def __init__(self, backend: _Backend, folder: Path, symmetric: bool, cache_bytes: int) -> None:
        codes, scales, zeros = load_weight(folder, "symmetric" if symmetric else "asymmetric")
        self.symmetric, self._backend = symmetric, backend
        self._out = len(codes)
        kind, data = (_Q4_0 if symmetric else _Q4_1), q4.blocks(codes, scales, None if symmetric else zeros)
        buffers = backend.buffers(kind, codes.shape[1], self._out)
        self.place, self.bytes = _buffer_name(buffers).decode(), data.nbytes
        self.copies = copies_beyond(cache_bytes, self.bytes)
        self._context = _context(self.copies)
        self._weights = [_new_tensor(self._context, kind, codes.shape[1], self._out) for _ in range(self.copies)]
        self._buffer = _place_from(self._context, buffers)
        for weight in self._weights:
            _set(weight, data.ctypes.data, 0, data.nbytes)
        self._products: dict[int, _Product] = {}

    def prepare(self, x: np.ndarray, threads: int) -> None:
        self._backend.set_threads(threads)
        x = np.ascontiguousarray(x, np.float32)
        counts = {1, self.copies} if len(x) <= COLD_ROWS else {1}
        self._products = {n: _Product(self._backend, self._weights[:n], x, self._out) for n in counts}

    def run(self, copies: int) -> None:
        self._products[copies].run()

    def output(self, copies: int) -> np.ndarray:
        self.run(copies)
        return self._products[copies].output()

    def __del__(self) -> None:
        self._products = {}
        _free_buffer(self._buffer)
        _free(self._context)


class GgmlMatmul(MatmulWorker):
    """Takes fp32 activations, which its kernels round to int8 in blocks of 32."""

    def __init__(self) -> None:
        self._backend = _Backend()

    def versions(self) -> dict[str, str]:
        return versions()

    def _kernels(self, folder: Path, cache_bytes: int) -> dict[str, Kernel]:
        kernels = [_GgmlKernel(self._backend, folder, symmetric, cache_bytes) for symmetric in (True, False)]
        return {f"llama.cpp Q4_{0 if k.symmetric else 1} ({k.place})": k for k in kernels}


def _context(tensors: int) -> int:
    """A ggml context for the descriptions of some tensors and of what is computed from them; not for their data."""
    return _init(_Parameters(2 * tensors * _tensor_overhead() + _graph_overhead() + 4096, None, True))
