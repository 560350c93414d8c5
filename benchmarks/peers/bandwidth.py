"""How fast this machine reads memory: a small native loop, compiled when the worker starts."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


class Bandwidth:
    """Reads a buffer much larger than the caches."""

    def __init__(self) -> None:
        self._library = _compile(Path(__file__).with_name("bandwidth.cpp"))
        self._library.make_buffer.restype = ctypes.c_void_p
        self._library.make_buffer.argtypes = [ctypes.c_size_t, ctypes.c_int]
        self._library.read_buffer.restype = ctypes.c_double
        self._library.read_buffer.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_bool]

    def versions(self) -> dict[str, str]:
        return {}

    def load(self, size: int) -> None:
        """Allocates the buffer, of `size` bytes."""
        self._size = size
        self._buffer = self._library.make_buffer(size, os.cpu_count() or 1)
        if not self._buffer:
            raise MemoryError(f"there are no {size} bytes for the probe of the read bandwidth")

    def measure(self, threads: int, passes: int = 3) -> float:
        """GB/s, the best of a few passes with and without prefetching: a limit is what the machine can do, not what it
        mostly does."""
        seconds = min(
            self._library.read_buffer(self._buffer, self._size, threads, asks_ahead)
            for _ in range(passes)
            for asks_ahead in (False, True)
        )
        return self._size / seconds / 1e9


def _compile(source: Path) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise ImportError("a C++ compiler", name="a C++ compiler")
    flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bandwidth.so"
        subprocess.run([*compiler.split(), *flags, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))  # stays loaded when the file is gone
