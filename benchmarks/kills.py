"""Kills a quantization at random moments, resumes it, and compares what it ends with to an undisturbed run's.

    python benchmarks/kills.py --model MODEL --calibration FILE.json [--kills 20] [--seed 0] [--output NAME]

MODEL is a model directory; it is quantized from the disk. A run is killed (SIGKILL) again and again, each time after a
random part of the time that an undisturbed one takes, until it ends; then another begins, until there were enough
kills. Every run has to save the same bytes as the undisturbed one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from writing import write_results

from autoq import AutoQForCausalLM, __version__


def main() -> None:
    arguments = _arguments()
    if arguments.worker is not None:
        _quantize(arguments)
        return
    chance = random.Random(arguments.seed)
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    kills, different, runs, done_at_kill = 0, 0, 0, []
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        start = time.perf_counter()
        subprocess.run([*command, place / "undisturbed"], check=True)
        whole = time.perf_counter() - start
        expected = _digest(place / "undisturbed")
        while kills < arguments.kills:
            runs += 1
            while True:
                process = subprocess.Popen([*command, place / "run"])
                try:
                    if process.wait(chance.uniform(0.05, 1.0) * whole):
                        raise SystemExit(f"run {runs} failed by itself, after {kills} kills")
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                    done_at_kill.append(len(list((place / "run").glob("work/block-*.safetensors"))))
            different += _digest(place / "run") != expected
            print(f"run {runs}: {kills} kills so far, {different} results that differ", flush=True)
            shutil.rmtree(place / "run")
    text = (
        f"{kills} kills (SIGKILL) at random moments in {runs} runs of {whole:.0f} s, with "
        f"{', '.join(map(str, done_at_kill))} blocks done then: {runs - different} results are identical byte for byte "
        f"to an undisturbed run's, {different} are not.\n\n`python benchmarks/kills.py --model {arguments.model.name} "
        f"--calibration {arguments.calibration.name} --kills {arguments.kills} --seed {arguments.seed}`; "
        f"autoq {__version__}.\n"
    )
    print(text)
    result = {"kills": kills, "runs": runs, "different": different, "seconds": whole, "blocks_done": done_at_kill}
    write_results(arguments.output, result, text)
    sys.exit(different > 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--calibration", type=Path, required=True, help="JSON list of strings, one sample each")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kills"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _quantize(arguments: argparse.Namespace) -> None:
    """One run, from wherever an earlier one in the same directory was stopped."""
    from transformers import AutoTokenizer

    model = AutoQForCausalLM.from_pretrained(arguments.model, device_map="disk")
    model.quantize(
        AutoTokenizer.from_pretrained(arguments.model),
        {"bits": 4, "lm_head_bits": 8, "embedding_bits": 8},
        calib_data=arguments.calibration,
        max_calib_seq_len=256,
        max_calib_samples=32,
        work_dir=arguments.worker / "work",
        progress=False,
    )
    model.save_quantized(arguments.worker / "result")


def _digest(place: Path) -> str:
    """Of the weights, and of what the report says of each linear."""
    digest = hashlib.sha256()
    for path in sorted(place.glob("result/*.safetensors")):
        digest.update(path.read_bytes())
    report = json.loads((place / "result" / "quantization_report.json").read_text())
    digest.update(json.dumps([report["linears"], report["held_out"]]).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
