"""The CPU kernels by themselves, without torch: for this processor and, under emulation, for ARM ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from operators import CAPABILITIES, needs_extension
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "csrc" / "cpu").glob("*.cpp"), *(ROOT / "tests" / "native").glob("*.cpp")])
COMPILER = os.environ.get("CXX", "c++").split()
ARM_COMPILER = ["aarch64-linux-gnu-g++"]
ARM_EMULATOR = "qemu-aarch64"

pytestmark = pytest.mark.timeout(900)  # half a minute on an idle machine, most of it the compiler's


def build(compiler: list[str], folder: Path, *extra: str) -> Path:
    """The test program of tests/native, with the kernels as the extension has them."""
    # Optimized less than the extension, which would take minutes; contraction would change results.
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", *extra, *(f"-I{path}" for path in cpp_extension.include_paths())]

    def compile_source(source: Path) -> str:
        compiled = folder / f"{source.parent.name}-{source.stem}.o"
        subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(compiled)], check=True)
        return str(compiled)

    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(compile_source, SOURCES))
    program = folder / "kernels"
    subprocess.run([*compiler, *flags, *compiled, "-o", str(program)], check=True)
    return program


def run(*command: str) -> list[str]:
    """The instruction sets that the program found on the processor; its checks must hold."""
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout.splitlines()[0].split()


@needs_extension
@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="there is no C++ compiler")
def test_kernels_of_this_processor(tmp_path: Path) -> None:
    assert run(str(build(COMPILER, tmp_path))) == CAPABILITIES


@pytest.mark.skipif(
    shutil.which(ARM_COMPILER[0]) is None or shutil.which(ARM_EMULATOR) is None,
    reason=f"needs {ARM_COMPILER[0]} and {ARM_EMULATOR} (packages g++-aarch64-linux-gnu and qemu-user)",
)
def test_kernels_of_emulated_arm_processors(tmp_path: Path) -> None:
    program = str(build(ARM_COMPILER, tmp_path, "-static"))
    assert run(ARM_EMULATOR, "-cpu", "max", program) == ["portable", "neon"]
    # A processor of 2012, without dot products of bytes.
    assert run(ARM_EMULATOR, "-cpu", "cortex-a53", program, "list") == ["portable"]
