"""The CUDA kernels of csrc/cuda compiled for the host, for the tests; what is emulated is said in host.h.

`library()` builds the shared library, once for each state of the sources, and `run` calls a function of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "cuda"
ORDERS = {"ascending": 0, "descending": 1, "random": 2}

_FLAGS = ["-std=c++20", "-O1", "-fPIC", "-DAUTOQ_CUDA_HOST", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
_FLAGS.append("-U_FORTIFY_SOURCE")  # whose longjmp refuses to change stacks


def compiler() -> str | None:
    """The C++ compiler, or None; the emulation's way of switching threads is that of Linux."""
    return shutil.which(os.environ.get("CXX", "c++")) if os.name == "posix" else None


def sources() -> list[Path]:
    """All kernels, and what calls them; counters.cu and ops.cpp are about CUDA's streams and torch."""
    return sorted([*(path for path in KERNELS.glob("*.cu") if path.name != "counters.cu"), *HERE.glob("*.cpp")])


@cache
def library() -> ctypes.CDLL:
    """The library, from the build of an earlier run where no source has changed since."""
    everything = [*sources(), *HERE.glob("*.h"), *KERNELS.glob("*.h"), *(ROOT / "csrc").glob("*.h")]
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in sorted(everything):
        digest.update(path.read_bytes())
    built = ROOT / "build" / "cuda_host" / f"{digest.hexdigest()[:16]}.so"
    built.parent.mkdir(parents=True, exist_ok=True)
    with open(built.parent / "lock", "w") as lock:  # one of the processes that run tests builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _build(built)
    loaded = ctypes.CDLL(str(built))
    loaded.host_problem.restype = ctypes.c_char_p
    return loaded


def _build(target: Path) -> None:
    # The emulation borrows torch's conversions of 16-bit numbers.
    includes = [f"-I{path}" for path in [HERE, KERNELS, *cpp_extension.include_paths()]]

    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def compile_one(source: Path) -> str:
            result = f"{folder}/{source.name}.o"
            _call([compiler(), *_FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", result])
            return result

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources()))
        _call([compiler(), "-shared", *objects, "-o", f"{folder}/all.so"])
        os.replace(f"{folder}/all.so", target)


def _call(command: list[Any]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def set_device(multiprocessors: int = 4, shared_bytes: int = 227 * 1024, capability: tuple[int, int] = (9, 0)) -> None:
    """The GPU that the kernels' launchers see from now on."""
    library().host_set_device(multiprocessors, shared_bytes, *capability)


def run(function: str, *arguments: Tensor | float | None, order: str = "ascending", seed: int = 0) -> None:
    """Calls a function of the library with tensors, by their address, and numbers.

    Every tensor becomes a buffer that kernels may read and write, and nothing else. Raises AssertionError with what the
    emulation found wrong, RuntimeError when a kernel was not launched.
    """
    native = library()
    native.host_reset(ORDERS[order], seed)
    converted: list[Any] = []
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            assert argument.is_contiguous()
            address = ctypes.c_void_p(argument.data_ptr())
            native.host_add_buffer(address, ctypes.c_int64(argument.nbytes), True, f"argument {i}".encode())
            converted.append(address)
        elif isinstance(argument, bool):
            converted.append(ctypes.c_bool(argument))
        elif isinstance(argument, int):
            converted.append(ctypes.c_int64(argument))
        elif argument is None:
            converted.append(ctypes.c_void_p())
        else:
            converted.append(ctypes.c_float(argument))
    called = getattr(native, function)
    called.restype = ctypes.c_char_p
    error = called(*converted)
    if error is not None:
        raise RuntimeError(error.decode())
    problem = native.host_problem().decode()
    assert not problem, problem


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/layout.h counts them
