"""Everything that is due on a GPU, in one command: builds the extension, tests it there, and times it.

    python benchmarks/gpu.py [--shape tinyllama-1.1b llama-2-7b] [--skip-build]

Builds in place against the torch of this Python, runs the CUDA operator tests (every width and odd shapes against
float64), then benchmarks/latency.py, whose Markdown and JSON go to benchmarks/results/latency-gpu.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", default=["tinyllama-1.1b", "llama-2-7b"])
    parser.add_argument("--skip-build", action="store_true", help="the extension is built already")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        return "no CUDA device is available to this torch; run this on a machine with a GPU"
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    environment = {**os.environ, "AUTOQ_REQUIRE_NATIVE": "1", "PYTHONPATH": str(ROOT)}
    steps = [
        [sys.executable, "-m", "pytest", "-q", "tests/test_ops.py", "-k", "cuda"],
        [sys.executable, "benchmarks/latency.py", "--output", "benchmarks/results/latency-gpu"],
    ]
    steps[1] += ["--shape", *arguments.shape]
    if not arguments.skip_build:
        major, minor = torch.cuda.get_device_capability()
        # One architecture builds in a fraction of the time of all.
        environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}" + ("a" if major == 9 else "")
        steps.insert(0, [sys.executable, "setup.py", "build_ext", "--inplace"])
    for step in steps:
        print("$", " ".join(step[1:]), flush=True)
        if subprocess.run(step, cwd=ROOT, env=environment).returncode:
            return f"{step[1]} failed"
    return None


if __name__ == "__main__":
    sys.exit(main())
