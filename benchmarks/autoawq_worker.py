"""The AutoAWQ side of the side-by-side benchmarks.

This script runs inside an environment of its own that holds AutoAWQ (autoawq 0.2.9 with transformers 4.51.3 for Llama
and Falcon, autoawq 0.2.7.post3 with transformers 4.46.3 for OPT, Bloom, MPT and GPT-J); it needs awq, torch,
transformers and safetensors, and nothing of autoq. ``compare_autoawq.py`` calls it as a subprocess. Every subcommand
prints one JSON object as the only line on standard output; progress bars and warnings go to standard error.

AutoAWQ does the work through its own public entry point. What is changed, and why:

* On a CPU, AutoAWQ corrupts the weights it is searching scales for: it keeps the originals as
  ``org_sd = {k: v.cpu() ...}``, which copies from a GPU but only aliases on a CPU, so the first candidate scale stays
  in them and the result is worse than round-to-nearest. ``CopyingQuantizer`` makes that a copy.
* Calibration text reaches AutoAWQ as token ids. Given strings, it would strip their white space (which changes the
  tokens) and, when lengths differ from the maximum, drop samples or join them into one another.
* ``REPAIRS`` holds what single families need to run at all; each entry says what was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import resource
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from awq.models._config import AwqConfig
from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
from awq.models.base import BaseAWQForCausalLM
from awq.models.falcon import FalconAWQForCausalLM
from awq.models.mpt import MptAWQForCausalLM
from awq.modules.act import ScaledActivation
from awq.quantize.quantizer import AwqQuantizer
from awq.utils.module import exclude_layers_to_not_quantize, get_named_linears, get_op_name, set_op_by_name
from awq.utils.packing_utils import dequantize_gemm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

Tokens = list[list[int]]

SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": 22,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
}


# ---- AutoAWQ, made to run on a CPU ----------------------------------------------------------------------------------


@contextlib.contextmanager
def cpu_copies() -> Iterator[None]:
    """Let ``Tensor.cpu()`` return a copy of a tensor that is on the CPU already, as it does for one on a GPU."""
    original = torch.Tensor.cpu

    def cpu(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor.clone() if tensor.device.type == "cpu" else original(tensor, *args, **kwargs)

    torch.Tensor.cpu = cpu  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.Tensor.cpu = original  # type: ignore[method-assign]


class CopyingQuantizer(AwqQuantizer):
    """AutoAWQ's quantizer, restoring the true weights after each candidate scale on a CPU too.

    Only the scale search runs under ``cpu_copies``: nothing else in AutoAWQ relies on the copy, and copying every
    captured activation would charge it memory and time that it does not need.
    """

    def _compute_best_scale(self, *args: Any, **kwargs: Any) -> Tensor:
        with cpu_copies():
            return super()._compute_best_scale(*args, **kwargs)


def keep_block_arguments(model: Any) -> None:
    """Let the blocks be called with all the arguments that the model itself called the first of them with.

    AutoAWQ passes the arguments it caught through ``prepare_inputs_for_generation`` and goes on with what that
    returns; for these families it returns a fixed list without the position bias that the blocks require.
    """
    original = model.prepare_inputs_for_generation

    def prepare(input_ids: Tensor, **caught: Any) -> dict[str, Any]:
        return {**original(input_ids, **caught), **caught}

    model.prepare_inputs_for_generation = prepare


def repair_falcon(_model: Any) -> None:
    """Tell the 7B layout by the architecture flag; AutoAWQ tells it by ``num_attention_heads == 71``.

    Any other Falcon of that layout is taken for a 40B and fails on the missing ``ln_attn``.
    """
    original = FalconAWQForCausalLM.get_layers_for_scaling

    def get_layers_for_scaling(block: Any, input_feat: Any, module_kwargs: Any) -> list[dict[str, Any]]:
        if block.config.new_decoder_architecture:
            return original(block, input_feat, module_kwargs)
        heads = block.config.num_attention_heads
        block.config.num_attention_heads = 71  # read by nothing but the test above while this call lasts
        try:
            return original(block, input_feat, module_kwargs)
        finally:
            block.config.num_attention_heads = heads

    FalconAWQForCausalLM.get_layers_for_scaling = staticmethod(get_layers_for_scaling)


def repair_mpt(model: Any) -> None:
    """Fit AutoAWQ's MPT, written for the remote code of that family, to transformers' own.

    It moves an embedding dropout that transformers' model has not, and calls ``ffn(x)`` where ``MptMLP.forward`` wants
    the residual as well, adds it to its output, and so cancels it from the search's loss.
    """
    keep_block_arguments(model)
    model.transformer.emb_drop = nn.Identity()
    original = MptAWQForCausalLM.get_layers_for_scaling

    def get_layers_for_scaling(block: Any, input_feat: Any, module_kwargs: Any) -> list[dict[str, Any]]:
        groups = original(block, input_feat, module_kwargs)
        for group in groups:
            if group.get("module2inspect") is block.ffn:
                group["kwargs"] = {"residual": 0.0}
        return groups

    MptAWQForCausalLM.get_layers_for_scaling = staticmethod(get_layers_for_scaling)


REPAIRS: dict[str, Callable[[Any], None]] = {
    "bloom": keep_block_arguments,
    "falcon": repair_falcon,
    "mpt": repair_mpt,
}


# ---- Models and calibration tokens ----------------------------------------------------------------------------------


def load_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the transformers model in ``directory`` on the CPU in ``dtype``, its key/value cache off.

    With the cache on, AutoAWQ's repeated forwards through one block would each append to the same cache.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=dtype, use_safetensors=True)
    model.config.use_cache = False
    return model.eval()


def random_model(shape: str, layers: int | None, dtype: torch.dtype) -> PreTrainedModel:
    """Build a Llama of the named shape with random weights, cut to ``layers`` blocks unless that is None."""
    sizes = dict(SHAPES[shape])
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, use_cache=False)
    return AutoModelForCausalLM.from_config(config, torch_dtype=dtype).eval()


def wrap(model: PreTrainedModel) -> BaseAWQForCausalLM:
    """Put a transformers model into AutoAWQ's wrapper for its family, repaired where the family needs it.

    Raises:
        ValueError: AutoAWQ has no wrapper for the family.
    """
    family = model.config.model_type
    if family not in AWQ_CAUSAL_LM_MODEL_MAP:
        raise ValueError(f"AutoAWQ {version('autoawq')} does not support the model type {family!r}.")
    if family in REPAIRS:
        REPAIRS[family](model)
    return AWQ_CAUSAL_LM_MODEL_MAP[family](model, family, False, model.config, AwqConfig(), None)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Load ``tokenizer.json`` by itself: the class named beside it by transformers 5 is unknown to transformers 4."""
    return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))


def calibration_tokens(file: Path, model: Path, samples: int, length: int) -> Tokens:
    """Read the first ``samples`` calibration samples of ``file`` as exactly ``length`` token ids each.

    Args:
        file: JSON list of strings (tokenized without special tokens) or of lists of token ids.
        model: directory with the tokenizer.json for strings.
        samples: how many samples to take.
        length: tokens taken of each sample, from its beginning.

    Raises:
        ValueError: there are too few samples, or a sample is too short; AutoAWQ would silently run on less, or join
            the short sample to the next one.
    """
    data = json.loads(file.read_text(encoding="utf-8"))[:samples]
    if len(data) < samples:
        raise ValueError(f"{file} holds {len(data)} samples, {samples} were asked for; lower --max-samples.")
    if isinstance(data[0], str):
        tokenizer = load_tokenizer(model)
        data = [tokenizer.encode(text, add_special_tokens=False) for text in data]
    shortest = min(len(sample) for sample in data)
    if shortest < length:
        raise ValueError(f"A sample of {file} has {shortest} tokens, {length} were asked for; lower --seq-len.")
    return [sample[:length] for sample in data]


def random_tokens(vocabulary: int, samples: int, length: int) -> Tokens:
    """Draw ``samples`` sequences of ``length`` token ids uniformly from the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (samples, length), generator=generator).tolist()


# ---- Quantizing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """What one call of AutoAWQ's ``quantize`` cost.

    Peaks are of the resident set of the whole process, in bytes, before and after the call; ``tokens`` is the
    number of tokens that went through the blocks.
    """

    seconds: float
    peak_rss_before: int
    peak_rss: int
    tokens: int
    threads: int


def peak_rss() -> int:
    """Return the largest resident set size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions() -> dict[str, str]:
    """Return the versions of the packages that determine the result."""
    return {name: version(name) for name in ("autoawq", "transformers", "torch")}


def run_quantizer(awq: BaseAWQForCausalLM, tokens: Tokens, bits: int, group_size: int, *, pack: bool) -> Measurement:
    """Run AutoAWQ's ``quantize`` on ``tokens`` and measure it.

    Args:
        awq: the wrapped model, changed in place.
        tokens: equally long calibration samples.
        bits: code width; AutoAWQ packs 4 only.
        group_size: columns that share a scale.
        pack: replace each linear by the packed one; otherwise only apply scales and clips (``export_compatible``).

    Raises:
        RuntimeError: AutoAWQ has not used every token.
    """
    config = {"zero_point": True, "q_group_size": group_size, "w_bit": bits, "version": "GEMM"}
    before = peak_rss()
    start = time.perf_counter()
    awq.quantize(
        tokenizer=None,
        quant_config=config,
        calib_data=tokens,
        export_compatible=not pack,
        max_calib_samples=len(tokens),
        max_calib_seq_len=len(tokens[0]),
        quantizer_cls=CopyingQuantizer,
    )
    seconds = time.perf_counter() - start
    seen = math.prod(awq.quantizer.inps.shape[:2])
    if seen != len(tokens) * len(tokens[0]):
        raise RuntimeError(f"AutoAWQ used {seen} calibration tokens of {len(tokens)} x {len(tokens[0])}.")
    return Measurement(seconds, before, peak_rss(), seen, torch.get_num_threads())


@torch.no_grad()
def last_block_output(awq: BaseAWQForCausalLM, tokens: Tokens, batch: int = 16) -> Tensor:
    """Return what the model's last block puts out for ``tokens``, float [samples, length, hidden]."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = awq.get_model_layers(awq.model)[-1].register_forward_hook(keep)
    for part in torch.tensor(tokens).split(batch):
        awq.model(part)
    handle.remove()
    return torch.cat(outputs)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of ``expected``."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def block_linears(awq: BaseAWQForCausalLM, block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of ``block`` that AutoAWQ quantizes, by their name in the block."""
    return exclude_layers_to_not_quantize(get_named_linears(block), awq.quant_config.modules_to_not_convert)


@torch.no_grad()
def round_weights(awq: BaseAWQForCausalLM) -> int:
    """Round the block linears with AutoAWQ's own ``pseudo_quantize_tensor``; return how many there are."""
    count = 0
    for block in awq.get_model_layers(awq.model):
        for linear in block_linears(awq, block).values():
            linear.weight.data = awq.quantizer.pseudo_quantize_tensor(linear.weight.data)[0]
            count += 1
        fold_activation_scales(awq, block)
    return count


def fold_activation_scales(awq: BaseAWQForCausalLM, block: nn.Module) -> None:
    """Move AutoAWQ's division after an activation function into the (rounded) linear that follows.

    An activation function cannot absorb a scale, so AutoAWQ wraps it in ``ScaledActivation``, which the plain
    transformers model does not have. act(x) / s * W' = act(x) * (W' / s), so the plain model computes the same.
    """
    for group in awq.get_layers_for_scaling(block, defaultdict(lambda: None), {}):
        activation = group["prev_op"]
        if isinstance(activation, ScaledActivation):
            for linear in group["layers"]:
                linear.weight.div_(activation.scales.view(1, -1))
            set_op_by_name(block, get_op_name(block, activation), activation.act)


def plain_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the model's tensors as float32 under transformers' names; of tied tensors only the first."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().float().contiguous()
    return tensors


def copy_configuration(source: Path, target: Path) -> None:
    """Copy the JSON files (configuration and tokenizer) beside the weights, so that the directory loads as a model."""
    for file in source.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)


def write_result(directory: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write ``result`` as result.json into ``directory`` and return it."""
    (directory / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def describe(arguments: argparse.Namespace, measurement: Measurement) -> dict[str, Any]:
    """Return the settings, the cost and the versions of a run as one dictionary for JSON."""
    return {
        "model": arguments.model.name if arguments.model else arguments.shape,
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "dtype": arguments.dtype,
        "samples": arguments.max_samples,
        "seq_len": arguments.seq_len,
        **asdict(measurement),
        "versions": versions(),
    }


# ---- Subcommands ----------------------------------------------------------------------------------------------------


def quantize(arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantize with AutoAWQ and save the effective weights in full precision (``model.safetensors``, float32).

    ``calibration_difference`` in the result compares the hidden states AutoAWQ carried through the blocks with those
    of the model itself: near zero says that it calibrated with the right masks, positions and samples.
    """
    awq = wrap(load_model(arguments.model, getattr(torch, arguments.dtype)))
    tokens = calibration_tokens(arguments.calibration, arguments.model, arguments.max_samples, arguments.seq_len)
    expected = last_block_output(awq, tokens)
    measurement = run_quantizer(awq, tokens, arguments.bits, arguments.group_size, pack=False)
    difference = relative_difference(awq.quantizer.inps, expected)
    linears = round_weights(awq)
    arguments.out.mkdir(parents=True, exist_ok=True)
    copy_configuration(arguments.model, arguments.out)
    save_file(plain_tensors(awq.model), arguments.out / "model.safetensors", metadata={"format": "pt"})
    result = {**describe(arguments, measurement), "calibration_difference": difference, "linears": linears}
    return write_result(arguments.out, result)


def quantize_native(arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantize and save the way an AutoAWQ user does: a packed GEMM checkpoint from ``save_quantized``."""
    awq = wrap(load_model(arguments.model, getattr(torch, arguments.dtype)))
    tokens = calibration_tokens(arguments.calibration, arguments.model, arguments.max_samples, arguments.seq_len)
    measurement = run_quantizer(awq, tokens, arguments.bits, arguments.group_size, pack=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    awq.save_quantized(str(arguments.out))
    for file in arguments.model.glob("*token*.json"):
        shutil.copyfile(file, arguments.out / file.name)
    return write_result(arguments.out, describe(arguments, measurement))


def dequantize(arguments: argparse.Namespace) -> dict[str, Any]:
    """Dequantize a GEMM checkpoint, ours or AutoAWQ's, with AutoAWQ's own unpacking.

    Linears become float16 [out, in] tensors named ``*.weight``; all other tensors are copied as they are, the
    ``scales`` of AutoAWQ's scaled activations among them.
    """
    checkpoint: Path = arguments.checkpoint
    settings = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    if settings["bits"] != 4:
        raise ValueError(f"{checkpoint} has {settings['bits']}-bit codes; AutoAWQ's GEMM format holds 4-bit codes.")
    tensors: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors.update(load_file(file))
    prefixes = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    for prefix in prefixes:
        parts = (tensors.pop(f"{prefix}.{part}") for part in ("qweight", "qzeros", "scales"))
        tensors[f"{prefix}.weight"] = dequantize_linear(*parts)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, arguments.out, metadata={"format": "pt"})
    return {"linears": len(prefixes), "tensors": len(tensors), "versions": versions()}


def dequantize_linear(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """Dequantize one 4-bit linear.

    Args:
        qweight: int32 [in, out / 8].
        qzeros: int32 [groups, out / 8].
        scales: float16 [groups, out].

    Returns:
        float16 [out, in].
    """
    group_size = qweight.shape[0] // scales.shape[0]
    return dequantize_gemm(qweight, qzeros, scales, 4, group_size).t().contiguous()


def time_quantize(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time AutoAWQ's ``quantize`` (scales and clips, no packing) on a random or a given model.

    Raises:
        ValueError: calibration text is given for a random model, which has no tokenizer.
    """
    if arguments.calibration and not arguments.model:
        raise ValueError("--calibration needs the tokenizer of a model; give --model, or leave --calibration out.")
    dtype = getattr(torch, arguments.dtype)
    if arguments.model:
        model = load_model(arguments.model, dtype)
    else:
        model = random_model(arguments.shape, arguments.layers, dtype)
    if arguments.calibration:
        tokens = calibration_tokens(arguments.calibration, arguments.model, arguments.max_samples, arguments.seq_len)
    else:
        tokens = random_tokens(model.config.vocab_size, arguments.max_samples, arguments.seq_len)
    measurement = run_quantizer(wrap(model), tokens, arguments.bits, arguments.group_size, pack=False)
    return {**describe(arguments, measurement), "layers": model.config.num_hidden_layers}


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the weights of a file with a model's own: perplexity of both and KL divergence in nats, in float32.

    The text is tokenized at once, without special tokens, and cut into windows that do not overlap; the remainder is
    dropped. Perplexity is taken over all tokens but the first of each window, divergence over all positions.
    """
    ids = load_tokenizer(arguments.model).encode(arguments.text.read_text(encoding="utf-8"), add_special_tokens=False)
    count = len(ids) // arguments.seq_len
    windows = torch.tensor(ids[: count * arguments.seq_len]).view(count, arguments.seq_len)[: arguments.windows]
    reference = load_model(arguments.model, torch.float32)
    quantized = load_model(arguments.model, torch.float32)
    load_weights(quantized, arguments.weights)
    return {**divergence(reference, quantized, windows), "windows": len(windows)}


def load_weights(model: PreTrainedModel, file: Path) -> None:
    """Load a safetensors file of transformers' names into ``model``; only tied tensors may be absent from it.

    Raises:
        ValueError: the file has a tensor that the model has not, or lacks one that the model needs.
    """
    with safe_open(file, framework="pt") as reader:
        found = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    needed = plain_tensors(model).keys()
    if found.keys() != needed:
        raise ValueError(f"{file} and the model differ in the tensors {sorted(found.keys() ^ needed)}.")
    model.load_state_dict(found, strict=False)
    model.tie_weights()


@torch.no_grad()
def divergence(reference: PreTrainedModel, quantized: PreTrainedModel, windows: Tensor) -> dict[str, float]:
    """Return both perplexities and the mean KL(reference || quantized) over ``windows``, int64 [windows, length]."""
    totals = torch.zeros(3, dtype=torch.float64)
    for batch in windows.split(8):
        expected = reference(batch).logits.log_softmax(-1)
        actual = quantized(batch).logits.log_softmax(-1)
        targets = batch[:, 1:, None]
        totals[0] -= expected[:, :-1].gather(-1, targets).sum(dtype=torch.float64)
        totals[1] -= actual[:, :-1].gather(-1, targets).sum(dtype=torch.float64)
        totals[2] += (expected.exp() * (expected - actual)).sum(dtype=torch.float64)
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    return {
        "perplexity_reference": math.exp(totals[0] / predicted),
        "perplexity": math.exp(totals[1] / predicted),
        "divergence": float(totals[2] / windows.numel()),
    }


# ---- Command line ---------------------------------------------------------------------------------------------------


def add_quantization_arguments(parser: argparse.ArgumentParser, *, dtype: str) -> None:
    """Add what every subcommand that quantizes needs; ``dtype`` is its default for the model's weights."""
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--max-samples", "--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of each sample")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default=dtype)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)

    for name, function, dtype in (("quantize", quantize, "float32"), ("quantize-native", quantize_native, "float16")):
        command = commands.add_parser(name, help=(function.__doc__ or "").splitlines()[0])
        command.add_argument("--model", type=Path, required=True, help="directory of the transformers model")
        command.add_argument("--calibration", type=Path, required=True, help="JSON list of strings or token id lists")
        command.add_argument("--out", type=Path, required=True, help="directory to write")
        add_quantization_arguments(command, dtype=dtype)
        command.set_defaults(function=function)

    command = commands.add_parser("dequantize", help=(dequantize.__doc__ or "").splitlines()[0])
    command.add_argument("--checkpoint", type=Path, required=True, help="directory of a 4-bit GEMM checkpoint")
    command.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    command.set_defaults(function=dequantize)

    command = commands.add_parser("time", help=(time_quantize.__doc__ or "").splitlines()[0])
    command.add_argument("--model", type=Path, help="time this model and not a random one")
    command.add_argument("--calibration", type=Path, help="calibrate on this file (with --model), not on random tokens")
    command.add_argument("--shape", choices=sorted(SHAPES), default="tinyllama")
    command.add_argument("--layers", type=int, help="blocks of the random model; default: all of the shape")
    add_quantization_arguments(command, dtype="bfloat16")
    command.set_defaults(function=time_quantize)

    command = commands.add_parser("evaluate", help=(evaluate.__doc__ or "").splitlines()[0])
    command.add_argument("--model", type=Path, required=True, help="directory of the full-precision model")
    command.add_argument("--weights", type=Path, required=True, help="safetensors file of the weights to judge")
    command.add_argument("--text", type=Path, required=True, help="text file to predict")
    command.add_argument("--seq-len", type=int, default=256, help="tokens of each window")
    command.add_argument("--windows", type=int, help="how many windows; default: all")
    command.set_defaults(function=evaluate)
    return parser


def main() -> None:
    """Run the subcommand of the command line and print its result as JSON."""
    arguments = build_parser().parse_args()
    print(json.dumps(arguments.function(arguments)))


if __name__ == "__main__":
    main()
