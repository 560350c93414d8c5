"""Trains the demo's model: a small Llama that writes the English of Python's documentation.

    python examples/demo/train.py --out MODEL

The tokenizer and the model see nothing but the text of `text.py`. The weights of the lowest loss on the held-out topics
are kept and saved as fp16, so that loss flatters the model a little; comparisons between its quantized forms stay fair.
A run is repeatable on one machine with one thread count and one Python version, unless `--minutes` ends it early.

The model beside this file was made with `--steps 2500 --minutes 23 --compile`: the clock ended it after 1533 steps.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import text
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
CONTEXT = 256
BATCH = 8
PEAK_LEARNING_RATE = 3e-3
WARMUP = 0.05  # Share of the run.
WEIGHT_DECAY = 0.1
EVALUATE_EVERY = 100  # Steps.
PATIENCE = 5  # Evaluations without a new best before the run ends.


def main() -> None:
    """Trains and saves tokenizer and model."""
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    documents = list(text.training_documents())
    tokenizer = train_tokenizer(documents)
    training = encode(tokenizer, documents)
    held_out = encode(tokenizer, [text.held_out_text()])
    model = make_model(tokenizer)
    forward = torch.compile(model) if arguments.compile else model
    print(f"{model.num_parameters():,} parameters, {len(training):,} training and {len(held_out):,} held-out tokens")
    best = train(model, forward, training, held_out, progress_of(arguments.steps, arguments.minutes))
    print(f"held-out loss {best:.4f}, perplexity {math.exp(best):.2f}")
    model.half().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo's model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=1500, help=f"batches of {BATCH} windows of {CONTEXT} tokens")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the run after this time at the latest")
    parser.add_argument("--compile", action="store_true", help="use torch.compile: half the time, needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from the documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=CONTEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """All documents as one row of int64 tokens, the end-of-text token behind each."""
    rows = tokenizer(documents, verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh fp32 model. Every linear's input is a multiple of 128 wide, so that the usual group sizes divide it."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",  # Windows are short: plain products are faster on a CPU than fused attention.
    )
    return LlamaForCausalLM(config)


def progress_of(steps: int, minutes: float) -> Callable[[int], float]:
    """How far the run is at a step, from 0 to 1: by steps or by the clock, whichever is ahead."""
    start = time.monotonic()
    return lambda step: min(1.0, max(step / steps, (time.monotonic() - start) / (60 * minutes)))


def train(
    model: LlamaForCausalLM,
    forward: Callable[..., CausalLMOutputWithPast],
    training: Tensor,
    held_out: Tensor,
    progress: Callable[[int], float],
) -> float:
    """Trains in place, leaves the model at its best held-out loss, and returns that loss.

    forward: the model itself, or the compiled function over its parameters.
    progress: the share of the run that is done at a step.
    """
    optimizer = make_optimizer(model)
    best, best_step, best_state = math.inf, 0, {}
    step, start = 0, time.monotonic()
    while progress(step) < 1.0 and step - best_step < PATIENCE * EVALUATE_EVERY:
        training_loss = training_step(forward, optimizer, sample_windows(training), learning_rate(progress(step)))
        step += 1
        if step % EVALUATE_EVERY == 0 or progress(step) == 1.0:
            loss = evaluate(model, held_out)
            seconds = time.monotonic() - start
            print(f"step {step:5d}  training {training_loss:.4f}  held-out {loss:.4f}  {seconds:5.0f} s", flush=True)
            if loss < best:
                best, best_step, best_state = loss, step, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return best


def make_optimizer(model: LlamaForCausalLM) -> AdamW:
    """AdamW that decays matrices but not the norms' gains."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    gains = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    return AdamW(groups, betas=(0.9, 0.98))


def learning_rate(progress: float) -> float:
    """A linear warmup, then half a cosine down to a hundredth of the peak."""
    if progress < WARMUP:
        return PEAK_LEARNING_RATE * (progress + 0.001) / WARMUP
    fall = (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))) / 2
    return PEAK_LEARNING_RATE * (0.01 + 0.99 * fall)


def sample_windows(tokens: Tensor) -> Tensor:
    """A batch of windows from random places, int64 `[BATCH, CONTEXT]`."""
    starts = torch.randint(len(tokens) - CONTEXT + 1, (BATCH, 1))
    return tokens[starts + torch.arange(CONTEXT)]


def training_step(
    forward: Callable[..., CausalLMOutputWithPast], optimizer: AdamW, windows: Tensor, rate: float
) -> float:
    """One step of gradient descent at a learning rate; returns the loss before it, in nats a token."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = forward(input_ids=windows, labels=windows).loss
    loss.backward()
    groups = optimizer.param_groups
    torch.nn.utils.clip_grad_norm_([parameter for group in groups for parameter in group["params"]], 1.0)
    for group in groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """The loss in fp32 over consecutive windows of the context length, in nats a token; a last, shorter one is left."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in windows.split(BATCH)]
    return float(sum(losses)) / len(windows)


if __name__ == "__main__":
    main()
