"""The auto-round side of tuning_peers.py; runs in an environment of its own, which has auto-round and nothing of autoq.

Tunes a model and writes its weights, rounded and dequantized, as safetensors; prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="samples of a step")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    texts = json.loads(arguments.calibration.read_text())[:128]
    ids = [torch.tensor(tokenizer(text).input_ids[: arguments.length]) for text in texts]
    ids = [one for one in ids if len(one) == arguments.length]  # it skips the others itself
    data = torch.utils.data.DataLoader([{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids])
    start = time.perf_counter()
    AutoRound(
        model,
        tokenizer,
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=False,
        iters=arguments.steps,
        batch_size=arguments.batch,
        seqlen=arguments.length,
        nsamples=len(ids),
        dataset=data,
        device_map="cpu",
        enable_torch_compile=False,
        amp=False,
    ).quantize()
    seconds = time.perf_counter() - start
    after = {name: tensor.float().clone() for name, tensor in model.state_dict().items()}
    changed = sum(not torch.equal(tensor, before[name].float()) for name, tensor in after.items() if name in before)
    save_file(after, arguments.out)
    print(json.dumps({"seconds": seconds, "changed": changed, "samples": len(ids), "version": version("auto-round")}))


if __name__ == "__main__":
    main()
