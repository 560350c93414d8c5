"""Everything that is due on a GPU, in one command: builds the extension, tests it there, and times it.

    python benchmarks/gpu.py [--only tests kernels] [--skip-build] [--minutes 8] [--output DIR]

Builds in place against the torch of this Python, for this GPU alone, and goes through the steps below, each a command
that can be run by itself in a time of its own. Without a build there is nothing to do; any other step that fails, or
takes too long, does not keep the others from running. Results, as Markdown and JSON, are written as they come.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent


class Step(NamedTuple):
    """A command of this Python, in which {output} is the directory of the results and {seconds} the time it has."""

    command: list[str]
    seconds: int
    environment: dict[str, str] | None = None


# A kernel that hangs cannot be interrupted, only its process be ended: the other tests go on in another one.
_PYTEST = ["-m", "pytest", "-q", "--timeout", "60", "--timeout-method", "thread"]
_TESTS = ["tests/test_cuda.py", "tests/test_block_cuda.py"]
BUILD = Step(["setup.py", "build_ext", "--inplace"], 240, {"NVCC_APPEND_FLAGS": "--split-compile=0"})
# In order of importance, since time may run out; what no default uses comes behind what one does.
STEPS = {
    "tests": Step([*_PYTEST, "-n", "6", *_TESTS, "-k", "not warpgroups"], 150, {"OMP_NUM_THREADS": "2"}),
    "kernels": Step(["benchmarks/gpu_kernels.py", "--output", "{output}/kernels-gpu"], 90),
    "models": Step(["benchmarks/gpu_models.py", "--output", "{output}/models-gpu", "--seconds", "{seconds}"], 150),
    "warpgroup-tests": Step([*_PYTEST, *_TESTS, "-k", "warpgroups"], 40),
    "warpgroups": Step(
        ["benchmarks/gpu_kernels.py", "--warpgroups", "--rows", "32", "64", "128", "256", "--output",
         "{output}/warpgroups-gpu"], 45
    ),
    # Which knows where an allocation ends, if torch does not cut them from larger ones.
    "sanitizer": Step(
        [*_PYTEST, "-x", "tests/test_cuda.py", "-k", "odd_shapes and float16"], 60,
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    ),
    "table": Step(["benchmarks/latency.py", "--shape", "llama-2-7b", "--output", "{output}/latency-gpu"], 60),
}  # fmt: skip


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--skip-build", action="store_true", help="the extension is built already")
    parser.add_argument("--minutes", type=float, default=8, help="all must end within this")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="where results go")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        return "no CUDA device is available to this torch; run this on a machine with a GPU"
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    end = time.monotonic() + 60 * arguments.minutes
    output = arguments.output.absolute()
    # All else would run without the extension too, and show nothing.
    problems = [] if arguments.skip_build else _run("build", BUILD, output, end)
    check = Step(["-c", "from autoq import _C; assert _C.build_info()['cuda_architectures'], 'no CUDA code'"], 60)
    problems += _run("check of the build", check, output, end)
    if problems:
        return "; ".join(problems)
    for name in arguments.only:
        problems += _run(name, STEPS[name], output, end)
    return "; ".join(problems) or None


def _run(name: str, step: Step, output: Path, end: float) -> list[str]:
    """Runs a step from the project's folder, until `end` at most. Returns what went wrong."""
    seconds = min(step.seconds, int(end - time.monotonic()))
    if seconds <= 10:
        return [f"{name} left out: the time is up"]
    # A script that is told of its time gets a little less, to end by itself.
    values = {"output": output, "seconds": max(seconds - 15, 10)}
    command = [sys.executable, *(word.format(**values) if word[:1] == "{" else word for word in step.command)]
    if name == "sanitizer":
        sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
        if sanitizer is None:
            return [f"{name} left out: there is no compute-sanitizer"]
        command = [sanitizer, "--error-exitcode", "1", *command]
    print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
    major, minor = torch.cuda.get_device_capability()
    environment = {
        **os.environ,
        "AUTOQ_REQUIRE_NATIVE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        # One architecture builds in a fraction of the time of all.
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}" + ("a" if major == 9 else ""),
        **(step.environment or {}),
    }
    start = time.monotonic()
    # In a session of its own, so that what it started ends with it.
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return [f"{name} cut off after {seconds} s"]  # not waited for: it may hang in the driver
    print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
    return [f"{name} failed"] if code else []


if __name__ == "__main__":
    sys.exit(main())
