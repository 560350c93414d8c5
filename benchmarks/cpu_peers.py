"""autoq beside other engines on a CPU: whole models and single matmuls, in one run on the same weights.

    python benchmarks/cpu_peers.py [--shape tinyllama-1.1b] [--threads 1 2] [--python llama.cpp=PYTHON ...]
    python benchmarks/cpu_peers.py --quick        # a tiny model and few rounds, to see that everything works

Whole models: autoq (also with a head of 8 or 4 bits, where llama.cpp's has 6, and with weights of 3 bits), transformers
in bf16, and llama.cpp (package llama-cpp-python) with Q4_0 and Q4_1 files that hold the same codes and scales, and a
Q4_K_M file made by llama.cpp's own quantizer. One matmul: autoq's linear, torch's int4 and bf16 kernels, onnxruntime's
MatMulNBits, llama.cpp's mul_mat. What is not installed is left out, which the results say. Every engine has a process
of its own, which keeps its model; they take turns within each round, and so does a probe of the read bandwidth, since
a machine's speed drifts. Needs gguf to write llama.cpp's files.

llama-cpp-python is to be compiled for the machine: CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python. On a
processor with AMX, GCC 12 drops most of the tile configuration in llama.cpp's code as dead stores, and the process ends
with SIGILL; -DCMAKE_CXX_FLAGS="-fno-tree-dse -fno-dse" keeps it.

Writes Markdown, JSON and, where matplotlib is installed, a plot to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

from peers import machine, report
from peers.bench import Bench
from peers.bench_matmuls import MatmulBench
from peers.bench_models import ENGINES, ModelBench
from shapes import SHAPES

_QUICK = {
    "shape": "tiny", "rounds": 2, "steps": 3, "depths": [0, 32], "batches": [1, 2], "prompts": [32],
    "matmuls": ["256x512"], "rows": [1, 16], "output": None,
}  # fmt: skip
PACKAGES = ("autoq", "transformers", "llama.cpp", "onnxruntime")


def main() -> None:
    arguments = _arguments()
    bench = Bench(arguments, _command())
    try:
        if arguments.work is not None:
            arguments.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            if arguments.engines:
                ModelBench(bench).measure(Path(folder))
            if arguments.matmuls:
                MatmulBench(bench).measure(Path(folder))
    finally:
        bench.close()
    print(report.markdown(bench.results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing unless --output is given")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tinyllama-1.1b")
    parser.add_argument("--layers", type=int, help="blocks of the model, if not all of the shape's")
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), default=list(ENGINES), help="whole models")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=JSON",
        help="autoq once more, as `autoq NAME`, with these keywords of from_quantized",
    )  # fmt: skip
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, machine.describe()["cores"]}))
    parser.add_argument("--rounds", type=int, default=5, help="times the engines take turns; prefill takes at most 3")
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded in each round")
    parser.add_argument("--depths", nargs="*", type=int, default=[0, 512, 2048], help="tokens in the cache")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4, 16], help="sequences decoded together")
    parser.add_argument("--prompts", nargs="*", type=int, default=[128, 512, 2048], help="tokens of a prefill")
    parser.add_argument("--matmuls", nargs="*", default=["4096x11008", "2048x5632"], help="in x out")
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 4, 16, 128, 512], help="of a matmul's activations")
    parser.add_argument(
        "--python", action="append", default=[], metavar="NAME=PYTHON",
        help=f"the Python that runs one of {', '.join(PACKAGES)}, if not this one",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, help="where the models are written for the run, if not with other files")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_peers"))
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**_QUICK)
    arguments = parser.parse_args()
    arguments.python = dict(_pair(parser, "--python", text) for text in arguments.python)
    arguments.variant = {
        name: json.loads(text) for name, text in (_pair(parser, "--variant", t) for t in arguments.variant)
    }
    if not arguments.python.keys() <= set(PACKAGES):
        parser.error(f"--python takes one of {', '.join(PACKAGES)}")
    return arguments


def _pair(parser: argparse.ArgumentParser, option: str, text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        parser.error(f"{option} takes NAME=VALUE, not {text!r}")
    return name, value


def _command() -> str:
    """The command line without paths, which mean nothing elsewhere."""
    words: list[str] = []
    skip = False
    for word in (part for text in sys.argv[1:] for part in (text.split("=", 1) if text[:2] == "--" else [text])):
        if not skip and word not in ("--work", "--output"):
            words.append(f"{word.partition('=')[0]}=PYTHON" if words[-1:] == ["--python"] else word)
        skip = word in ("--work", "--output")
    return shlex.join(["python", "benchmarks/cpu_peers.py", *words])


if __name__ == "__main__":
    main()
