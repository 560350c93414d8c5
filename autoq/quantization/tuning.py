"""What the best effort adds: a short tuning of each block, so that its output comes out right.

The search before it looks at one linear at a time, with the inputs of the full-precision model. Here a block gets what
the quantized blocks before it really give, and its codes, scales, norms and biases are moved together, by gradient
descent, towards the output of the full-precision model: so it makes up for errors of other linears and blocks.

The codes are learned as in AdaRound (Nagel et al., ICML 2020, arXiv:2004.10568) and SignRound (Cheng et al., 2023,
arXiv:2309.05516): each weight has a place between codes, which the descent moves, and rounding passes the gradient
through. Scales and norms learn with them as in OmniQuant (Shao et al., ICLR 2024, arXiv:2308.13137). What is on disk is
an ordinary AWQ checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from autoq.quantization.activations import map_tensors, to_fp32
from autoq.quantization.weight import QuantizedWeight, dequantize

# Steps for each block.
STEPS = 250
# Learning rates of Adam: of the places between codes, in codes; of the logarithm of the scales; and of norms and
# biases, as a share of their root mean square. All rise over the first steps and fall to nothing at the end.
_CODE_RATE = 0.005
_SCALE_RATE = 0.003
_OTHER_RATE = 0.003
_WARMUP = 0.05
# Compensated rounding leaves many weights far from their code. They start this near to it, or all would fall back to
# the nearest at once.
_START = 0.4
# Batches that tell whether the block got better.
_JUDGES = 16


class Batch(NamedTuple):
    """Samples of one length that go through the block together, on any device.

    inputs: what the quantized blocks before give, `[samples, tokens, hidden]`.
    target: what the block should give for them: what the full-precision model gives, of the same shape.
    keywords: the other arguments of the block.
    """

    inputs: Tensor
    target: Tensor
    keywords: Mapping[str, Any]


class _TunedWeight:
    """A quantized weight while it is learned."""

    def __init__(self, weight: Tensor, quantized: QuantizedWeight) -> None:
        self.quantized = quantized
        self.zeros = quantized.explicit_zeros().float().unsqueeze(2)
        self.scales = quantized.scales.float().unsqueeze(2)
        codes = quantized.codes.reshape(*quantized.scales.shape, -1).float()
        places = weight.reshape(codes.shape) / self.scales + self.zeros
        self.places = torch.clamp(places, codes - _START, codes + _START).requires_grad_()
        self.growth = torch.zeros_like(self.scales).requires_grad_()

    def weight(self) -> Tensor:
        """The quantized weight `[out, in]`; rounding passes the gradient through."""
        rounded = self.places + (self.places.round() - self.places).detach()
        codes = rounded.clamp(0, 2**self.quantized.bits - 1)
        return ((codes - self.zeros) * self.scales * self.growth.exp()).reshape(self.quantized.codes.shape)

    def result(self) -> QuantizedWeight:
        codes = self.places.detach().round().clamp(0, 2**self.quantized.bits - 1).to(torch.uint8)
        scales = (self.scales * self.growth.detach().exp()).squeeze(2).to(self.quantized.scales.dtype)
        return self.quantized._replace(codes=codes.reshape(self.quantized.codes.shape), scales=scales)


def tune_block(
    block: nn.Module,
    weights: Mapping[str, tuple[Tensor, QuantizedWeight]],
    batches: Sequence[Batch],
    dtype: torch.dtype = torch.float32,
    steps: int | None = None,
) -> dict[str, QuantizedWeight]:
    """Tunes the quantized weights of a block together with its norms and biases, which change in place.

    block: a decoder block with plain linears.
    weights: of each linear to quantize, by name, its weight in fp32 and what it was rounded to.
    dtype: that the biases of these linears will be kept in.
    batches: each step takes the next, in an order drawn anew once all had their turn; all is computed in fp32.
    steps: how many; None: `STEPS`.
    Returns the weights as tuned. A block that did not get better is left as it was.
    """
    steps = STEPS if steps is None else steps
    tuned = {name: _TunedWeight(*weight) for name, weight in weights.items()}
    # Norms and biases are vectors; a matrix that is not quantized stays what it is.
    others = {name: value for name, value in block.named_parameters() if value.dim() == 1}
    vectors = {name: value.detach().float().clone().requires_grad_() for name, value in others.items()}
    fixed = {name: value.detach().float() for name, value in block.named_parameters() if name not in vectors}
    groups: list[dict[str, Any]] = [
        {"params": [weight.places for weight in tuned.values()], "rate": _CODE_RATE},
        {"params": [weight.growth for weight in tuned.values()], "rate": _SCALE_RATE},
        *({"params": [value], "rate": _OTHER_RATE * _root_mean_square(value)} for value in vectors.values()),
    ]
    optimizer = torch.optim.Adam([{**group, "lr": 0.0} for group in groups], betas=(0.9, 0.99))

    def loss_of(batch: Batch) -> Tensor:
        matrices = {f"{name}.weight": weight.weight() for name, weight in tuned.items()}
        return _relative_error(block, {**fixed, **vectors, **matrices}, batch)

    judges = range(0, len(batches), max(1, len(batches) // _JUDGES))
    with torch.no_grad():
        before = sum(float(loss_of(batches[judge])) for judge in judges)
    order: list[int] = []
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (step + 1) / (_WARMUP * steps)) * (1 - step / steps)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss_of(batches[order.pop()]).backward()
        optimizer.step()
    with torch.no_grad():
        # Judged is what is kept: scales in fp16, norms in their own dtype.
        results = {name: weight.result() for name, weight in tuned.items()}
        matrices = {f"{name}.weight": dequantize(weight) for name, weight in results.items()}
        biases = {f"{name}.bias" for name in weights}
        kept = {
            name: (value.to(dtype) if name in biases else value).to(others[name].dtype)
            for name, value in vectors.items()
        }
        final = {**fixed, **{name: value.float() for name, value in kept.items()}, **matrices}
        # Not "after >= before": a loss that is not a number is no gain either.
        if not sum(float(_relative_error(block, final, batches[judge])) for judge in judges) < before:
            return {name: quantized for name, (_, quantized) in weights.items()}
        for name, value in others.items():
            value.copy_(kept[name])
    return results


def _root_mean_square(value: Tensor) -> float:
    # A bias that is all zero still has to move: as if its values were small, not none.
    return max(float(value.detach().square().mean().sqrt()), 1e-2)


def _relative_error(block: nn.Module, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """`|output - target|^2 / |target|^2`, the mean over tokens.

    Relative to each token's own size, since the norms that read the output divide by it; otherwise the few tokens with
    massive activations, such as the first of a text, would decide everything.
    """
    device = next(iter(parameters.values())).device
    inputs, target, keywords = map_tensors(tuple(batch), lambda tensor: to_fp32(tensor.to(device)))
    output = functional_call(block, dict(parameters), (inputs,), keywords)
    output = output[0] if isinstance(output, tuple) else output
    size = target.square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((output - target).square().sum(dim=-1) / size).mean()
