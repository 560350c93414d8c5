"""Builds the native extension `autoq._C` where it can, and installs the package in pure Python where it cannot.

Settings, read from the environment by the build alone:
AUTOQ_NO_CUDA=1          leave out the CUDA kernels although nvcc is there
AUTOQ_REQUIRE_NATIVE=1   fail rather than install without the extension
TORCH_CUDA_ARCH_LIST     GPU architectures, as torch spells them ("8.0;9.0a+PTX"); every supported one by default
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
CUDA_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")  # and the last one's PTX, for those to come
# The extension uses torch's stable ABI as of 2.11, so that one build serves that and every later release.
STABLE_ABI = "0x020b000000000000"
REQUIRE_NATIVE = os.environ.get("AUTOQ_REQUIRE_NATIVE") == "1"


def explain_pure_python(reason: str) -> None:
    """Says why there is no extension and how to get it, or stops the build where it is required."""
    message = (
        f"autoq is installed without its native extension, because {reason}.\n"
        "It works, but slowly. To get the extension, install torch and a C++ compiler, then run\n"
        "    pip install --no-build-isolation ."
    )
    if REQUIRE_NATIVE:
        raise SystemExit(f"{message}\nAUTOQ_REQUIRE_NATIVE=1 is set, so the build stops here.")
    print(f"\n{'*' * 100}\n{message}\n{'*' * 100}\n", flush=True)


def find_cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME or CUDA_PATH, the one whose nvcc is on PATH, or the usual place."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    candidates.append("/usr/local/cuda")
    for home in candidates:
        # nvcc on PATH may be a wrapper that stands outside its toolkit; the headers tell.
        if home and (Path(home) / "bin" / "nvcc").exists() and (Path(home) / "include" / "cuda_runtime.h").exists():
            return Path(home)
    return None


def cuda_architectures(cuda_home: Path) -> str:
    """Those of ours that a toolkit knows: 10.0 and 12.0 are of CUDA 12.8."""
    listed = subprocess.run(
        [str(cuda_home / "bin" / "nvcc"), "--list-gpu-arch"], stdout=subprocess.PIPE, text=True, check=True
    )
    known = set(re.findall(r"compute_(\d+)", listed.stdout))
    return ";".join(name for name in CUDA_ARCHITECTURES if re.sub(r"\D", "", name) in known) + "+PTX"


def sources(folder: str) -> list[str]:
    """The C++ and CUDA sources of a folder, relative to this file, as setuptools wants them."""
    found = [path for pattern in ("*.cpp", "*.cu") for path in (ROOT / folder).glob(pattern)]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def make_extension(cuda_home: Path | None) -> Any:
    """The extension, against torch's C++ libraries; with CUDA kernels when there is a toolkit."""
    from setuptools import Extension
    from torch.utils import cpp_extension

    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    settings: dict[str, Any] = {
        "sources": sources("csrc") + sources("csrc/cpu"),
        "include_dirs": cpp_extension.include_paths(),
        "library_dirs": cpp_extension.library_paths(),
        # Neither torch_python nor c10: their ABI changes with every release.
        "libraries": ["torch_cpu"],
        "extra_compile_args": {"cxx": flags},
        "language": "c++",
        "optional": not REQUIRE_NATIVE,
    }
    if cuda_home is not None:
        # torch's CUDAExtension would link torch_cuda and the shared runtime, which a CPU-only torch lacks. The kernels
        # need neither: they know pointers and a stream.
        cpp_extension.CUDA_HOME = str(cuda_home)
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_architectures(cuda_home)
        flags += ["-DUSE_CUDA", f'-DAUTOQ_CUDA_ARCHITECTURES="{os.environ["TORCH_CUDA_ARCH_LIST"]}"']
        settings["sources"] += sources("csrc/cuda")
        settings["include_dirs"].append(str(cuda_home / "include"))
        settings["library_dirs"].append(str(cuda_home / "lib64"))
        settings["libraries"] += ["cudart_static", "rt", "dl"]
        nvcc = settings["extra_compile_args"]["nvcc"] = ["-O3", "-std=c++20"]
        if "9.0a" in os.environ["TORCH_CUDA_ARCH_LIST"]:
            nvcc.append("-DAUTOQ_SM90A")
    return Extension("autoq._C", **settings)


def remove_stale_objects(folder: Path) -> None:
    """Removes the CUDA objects of an earlier build that are older than a header: torch's build rules for nvcc know no
    headers where torch itself has no CUDA."""
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.h"))
    for path in (folder / "csrc" / "cuda").glob("*.o"):
        if path.stat().st_mtime < newest:
            path.unlink()


def make_build_command() -> Any:
    """torch's build command, with the fallback to pure Python when the compiler fails."""
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuild(BuildExtension):
        def build_extensions(self) -> None:
            remove_stale_objects(ROOT / self.build_temp)
            try:
                super().build_extensions()
            except Exception as error:
                # The compiler's own output is printed above by the build tools.
                explain_pure_python(f"the compilation failed:\n{error}\n(AUTOQ_NO_CUDA=1 leaves out the CUDA kernels)")

    return OptionalBuild


def native_arguments() -> dict[str, Any]:
    """What `setup` needs for the extension; nothing when torch or a compiler is missing."""
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        explain_pure_python("torch cannot be imported in the build environment")
        return {}
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None and shutil.which("g++") is None:
        explain_pure_python("there is no C++ compiler")
        return {}
    cuda_home = None if os.environ.get("AUTOQ_NO_CUDA") == "1" else find_cuda_home()
    return {"ext_modules": [make_extension(cuda_home)], "cmdclass": {"build_ext": make_build_command()}}


setup(**native_arguments())
