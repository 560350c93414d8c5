"""The tuning of a block: it gets nearer to its target, keeps the format, and never makes a block worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoq.quantization import tuning
from autoq.quantization.tuning import Batch, tune_block
from autoq.quantization.weight import QuantizedWeight, dequantize, quantize


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)

    def forward(self, hidden: Tensor, gain: Tensor) -> tuple[Tensor, None]:
        return hidden + gain * self.down(torch.relu(self.up(self.norm(hidden)))), None


def _case(bits: int = 3) -> tuple[_Block, dict[str, tuple[Tensor, QuantizedWeight]], list[Batch]]:
    torch.manual_seed(0)
    block = _Block().requires_grad_(False)
    inputs = torch.randn(8, 2, 16, 32)
    gain = torch.ones((), dtype=torch.float16)
    batches = [Batch(part + 0.05 * torch.randn_like(part), block(part, gain)[0], {"gain": gain}) for part in inputs]
    weights = {
        name: (linear.weight.clone(), quantize(linear.weight, bits, 16))
        for name, linear in (("up", block.up), ("down", block.down))
    }
    return block, weights, batches


def _error(block: _Block, weights: dict[str, QuantizedWeight], batches: list[Batch]) -> float:
    for name, weight in weights.items():
        block.get_submodule(name).weight.copy_(dequantize(weight))
    return sum(float((block(batch.inputs, **batch.keywords)[0] - batch.target).square().sum()) for batch in batches)


def test_a_tuned_block_is_nearer_to_its_target() -> None:
    block, weights, batches = _case()
    rounded = {name: quantized for name, (_, quantized) in weights.items()}
    tuned = tune_block(block, weights, batches, steps=300)
    norm, bias = block.norm.weight.clone(), block.up.bias.clone()
    after = _error(block, tuned, batches)
    block, _, batches = _case()
    assert not torch.equal(norm, block.norm.weight)
    assert not torch.equal(bias, block.up.bias)
    assert after < 0.8 * _error(block, rounded, batches)
    for name, quantized in tuned.items():
        before = rounded[name]
        assert torch.equal(quantized.zeros, before.zeros)
        assert (quantized.scales.dtype, quantized.bits, quantized.group_size) == (torch.float16, 3, 16)
        assert (quantized.codes.dtype, int(quantized.codes.max())) == (torch.uint8, 7)
        assert not torch.equal(quantized.codes, before.codes)


def test_without_steps_every_code_stays_where_it_is() -> None:
    _, weights, _ = _case()
    for weight, quantized in weights.values():
        moved = quantized._replace(codes=(quantized.codes.int() - 1).clamp(min=0).to(torch.uint8))
        again = tuning._TunedWeight(weight, moved).result()  # though the weight is nearer to another code
        assert torch.equal(again.codes, moved.codes)
        assert torch.equal(again.scales, moved.scales)


def test_a_block_that_does_not_get_better_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    block, weights, batches = _case()
    monkeypatch.setattr(tuning, "_SCALE_RATE", 1e3)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    tuned = tune_block(block, weights, batches, steps=5)
    assert all(tuned[name] is quantized for name, (_, quantized) in weights.items())
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_a_few_tokens_of_great_size_do_not_decide() -> None:
    block, _, batches = _case()
    batch = batches[0]
    parameters = dict(block.named_parameters())
    plain = tuning._relative_error(block, parameters, batch._replace(target=batch.target + 0.1))
    target = batch.target.clone()
    target[:, 0] *= 1e4
    massive = tuning._relative_error(block, parameters, batch._replace(target=target))
    assert massive < 1  # the first token is wholly wrong: one in sixteen
    assert plain > 0
