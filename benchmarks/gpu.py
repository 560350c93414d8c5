"""Everything that is due on a GPU, in one command: builds the extension, tests it there, and times it.

    python benchmarks/gpu.py [--only tests kernels] [--skip-build] [--minutes 8]

Builds in place against the torch of this Python, for this GPU alone, and goes through the steps below, each a command
that can be run by itself. A step that fails does not keep the others from running; when the time is up, the one that
runs is cut off, and the others are left out. Results, as Markdown and JSON, go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results"

# In order of importance, since time may run out. Names ending in .py run in this Python.
STEPS = {
    "tests": ["-m", "pytest", "-q", "tests/test_cuda.py", "tests/test_block_cuda.py"],
    "kernels": ["benchmarks/gpu_kernels.py", "--output", f"{RESULTS}/kernels-gpu"],
    "models": ["benchmarks/gpu_models.py", "--output", f"{RESULTS}/models-gpu", "--seconds", "150"],
    "table": ["benchmarks/latency.py", "--shape", "llama-2-7b", "--output", f"{RESULTS}/latency-gpu"],
    "sanitizer": ["-m", "pytest", "-q", "-x", "tests/test_cuda.py", "-k", "odd_shapes or bits_and_groups"],
}  # fmt: skip


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--skip-build", action="store_true", help="the extension is built already")
    parser.add_argument("--minutes", type=float, default=8, help="all must end within this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        return "no CUDA device is available to this torch; run this on a machine with a GPU"
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    end = time.monotonic() + 60 * arguments.minutes
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    problems = [] if arguments.skip_build else _run("build", build, end)
    for name in arguments.only:
        command = _command(name)
        problems += [f"{name} left out: there is no compute-sanitizer"] if command is None else _run(name, command, end)
    return "; ".join(problems) or None


def _command(name: str) -> list[str] | None:
    command = [sys.executable, *STEPS[name]]
    if name != "sanitizer":
        return command
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    return None if sanitizer is None else [sanitizer, "--error-exitcode", "1", *command]


def _run(name: str, command: list[str], end: float) -> list[str]:
    """Runs a step from the project's folder, until `end` at most. Returns what went wrong."""
    left = end - time.monotonic()
    if left <= 0:
        return [f"{name} left out: the time is up"]
    print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
    major, minor = torch.cuda.get_device_capability()
    environment = {
        **os.environ,
        "AUTOQ_REQUIRE_NATIVE": "1",
        "PYTHONPATH": str(ROOT),
        # One architecture builds in a fraction of the time of all.
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}" + ("a" if major == 9 else ""),
    }
    if name == "sanitizer":  # which knows where an allocation ends, if torch does not cut them from larger ones
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=left).returncode
    except subprocess.TimeoutExpired:
        return [f"{name} cut off: the time is up"]
    print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
    return [f"{name} failed"] if code else []


if __name__ == "__main__":
    sys.exit(main())
