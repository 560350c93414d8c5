"""Quantizes a model with AWQ and saves it.

python examples/quantize.py MODEL OUT [--bits 4] [--group-size 128] [--head-bits 8] [--calibration FILE_OR_DATASET]

The model stays in the memory of the CPU; with [--device cuda:0 cuda:1] its blocks visit these GPUs. With
[--max-memory 16GiB] it stays on the disk, and one block at a time is in memory. With [--work-dir DIR] a run that was
stopped goes on when the same command is given again. Several processes share the work:
torchrun --nproc-per-node 2 examples/quantize.py MODEL OUT ...
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from transformers import AutoTokenizer

from autoq import AutoQForCausalLM
from autoq.errors import AutoQError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory or hub name of the full-precision model")
    parser.add_argument("out", help="directory to write")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--group-size", type=int, default=128, help="16, 32, 64, 128, 256, or -1 for whole rows")
    parser.add_argument("--effort", choices=("fast", "default", "best"), default="default")
    parser.add_argument("--target-bits", type=float, help="mean width of the codes, such as 4.25, instead of --bits")
    parser.add_argument("--scale-activations", action="store_true", help="better, but only autoq loads it")
    parser.add_argument("--symmetric", action="store_true", help="no zero points")
    parser.add_argument("--head-bits", type=int, choices=(2, 3, 4, 8), help="quantize the output head too")
    parser.add_argument("--embedding-bits", type=int, choices=(2, 3, 4, 8), help="quantize the embeddings too")
    parser.add_argument("--calibration", help="a .txt, .json, .jsonl or .parquet file, or the name of a dataset")
    parser.add_argument("--eval-data", help="held-out text that judges the result, as --calibration")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration sample")
    parser.add_argument("--device", nargs="+", help="where blocks are searched, such as cuda:0 cuda:1 (default: here)")
    parser.add_argument("--max-memory", help="what the process may take, such as 16GiB; the model stays on the disk")
    parser.add_argument("--work-dir", help="directory to resume from if stopped; delete it afterwards")
    parser.add_argument("--statistics", help="directory to keep the calibration's statistics in, or to use them from")
    parser.add_argument("--awq-cache", help="file to keep the search results in, or to apply them from (llm-awq's)")
    parser.add_argument("--max-kl", type=float, help="save nothing if the KL divergence on held-out text is larger")
    arguments = parser.parse_args()

    if Path(arguments.out).is_file():
        parser.error(f"{arguments.out} is a file; OUT is a directory")
    Path(arguments.out).mkdir(parents=True, exist_ok=True)  # what cannot be made is better known before
    model = AutoQForCausalLM.from_pretrained(arguments.model, device_map="disk" if arguments.max_memory else None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    except ValueError:
        raise SystemExit(f"error: {arguments.model} has no tokenizer that transformers can load") from None
    report = model.quantize(
        tokenizer,
        quant_config={
            "bits": arguments.bits,
            "group_size": arguments.group_size,
            "zero_point": not arguments.symmetric,
            "lm_head_bits": arguments.head_bits,
            "embedding_bits": arguments.embedding_bits,
            "effort": arguments.effort,
            "target_bits": arguments.target_bits,
            "scale_activations": arguments.scale_activations,
        },
        calib_data=arguments.calibration,
        max_calib_samples=arguments.samples,
        max_calib_seq_len=arguments.length,
        device=arguments.device,
        max_memory=arguments.max_memory,
        work_dir=arguments.work_dir,
        statistics=arguments.statistics,
        awq_cache=arguments.awq_cache,
        max_kl=arguments.max_kl,
        eval_data=arguments.eval_data,
    )
    if int(os.environ.get("RANK", 0)):
        return  # the first process saves
    print(report)
    model.save_quantized(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"saved to {arguments.out}; try: python examples/generate.py {arguments.out} 'Once upon a time'")


if __name__ == "__main__":
    try:
        main()
    except (AutoQError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; with --work-dir, the same command goes on where this one was") from None
