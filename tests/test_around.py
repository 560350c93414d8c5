"""Around the decoder blocks: the operators of a norm and of the tables of rotary positions, and how models use them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from families import FAMILIES, VARIANTS, Variant, quantized
from operators import DTYPES, TOLERANCE, error, exact_norm
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from autoq import model_ops
from autoq.architectures import architecture_of
from autoq.architectures.base import NormKind
from autoq.errors import OperatorError
from autoq.nn.around import StandIn
from autoq.nn.block import fuse_blocks, unfuse_blocks

LLAMA = next(family for family in FAMILIES if family.config.model_type == "llama")
ROTARY = [family for family in FAMILIES if family.config.model_type in ("llama", "falcon")]


# ---- the operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NormKind)
def test_norms_agree_with_float64(kind: NormKind, dtype: torch.dtype, capability: str) -> None:
    torch.manual_seed(0)
    for shape in ((37,), (1, 1, 2048), (2, 3, 40), (70, 513)):
        x = (3 + torch.randn(shape)).to(dtype)
        weight, bias = (torch.randn(shape[-1]).to(dtype) for _ in range(2))
        for vectors in ((None, None), (weight, None), (weight, bias)):
            exact = exact_norm(x, *vectors, kind, 1e-3)
            assert error(model_ops.norm(x, *vectors, kind, 1e-3), exact) < TOLERANCE[dtype]
            assert error(model_ops.reference_norm(x, *vectors, kind, 1e-3), exact) < TOLERANCE[dtype]


def test_a_norm_of_a_view_is_that_of_its_values() -> None:
    x = torch.randn(6, 5).T
    found = model_ops.norm(x, None, None, NormKind.RMS, 1e-5)
    torch.testing.assert_close(found, model_ops.reference_norm(x, None, None, NormKind.RMS, 1e-5))
    assert model_ops.norm(torch.empty(0, 5), None, None, NormKind.RMS, 1e-5).shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_tables_agree_with_float64(dtype: torch.dtype) -> None:
    for batch, angles in ((1, 32), (3, 1), (2, 300)):
        positions = torch.randint(0, 131072, (batch, 40))
        frequencies = 10000.0 ** (-torch.arange(angles) / angles)
        # The product is fp32 for all; sines of large angles are another thing than large angles.
        exact = (positions[..., None].float() * frequencies).double().repeat(1, 1, 2)
        for function in (model_ops.rotary_tables, model_ops.reference_rotary_tables):
            cosines, sines = function(positions, frequencies, 1.25, dtype)
            assert (cosines.dtype, sines.dtype) == (dtype, dtype)
            assert error(cosines, 1.25 * exact.cos()) < TOLERANCE[dtype]
            assert error(sines, 1.25 * exact.sin()) < TOLERANCE[dtype]


def test_opcheck() -> None:
    for x, weight, bias in ((torch.randn(2, 3, 9), torch.randn(9), None), (torch.randn(4, 8).half(), None, None)):
        torch.library.opcheck(torch.ops.autoq.norm.default, (x, weight, bias, 1, 1e-5))
    positions, frequencies = torch.arange(6).view(2, 3), torch.rand(4)
    torch.library.opcheck(torch.ops.autoq.rotary_tables.default, (positions, frequencies, 1.0, torch.bfloat16))


BAD_NORMS: dict[str, Any] = {
    "must be float32, bfloat16 or float16": (torch.ones(2, 4, dtype=torch.long), None, None, 1),
    "weight .* must be a vector of 4 values": (torch.ones(2, 4), torch.ones(5), None, 1),
    "bias .* in the dtype of the input": (torch.ones(2, 4), None, torch.ones(4).half(), 1),
    "kind is 2 but must be 0, a layer norm, or 1": (torch.ones(2, 4), None, None, 2),
}
BAD_TABLES: dict[str, Any] = {
    "positions must be int64": (torch.ones(1, 4), torch.ones(3), 1.0, torch.float32),
    "frequencies must be float32": (torch.ones(1, 4).long(), torch.ones(3).double(), 1.0, torch.float32),
    "dtype must be float32, bfloat16 or float16": (torch.ones(1, 4).long(), torch.ones(3), 1.0, torch.float64),
}


@pytest.mark.parametrize("sentence", [*BAD_NORMS, *BAD_TABLES], ids=str)
@pytest.mark.parametrize("name", ["operator", "reference"])
def test_wrong_arguments_get_a_sentence(name: str, sentence: str) -> None:
    function, arguments = (
        ({"operator": model_ops.norm, "reference": model_ops.reference_norm}[name], (*BAD_NORMS[sentence], 1e-5))
        if sentence in BAD_NORMS
        else (
            {"operator": model_ops.rotary_tables, "reference": model_ops.reference_rotary_tables}[name],
            BAD_TABLES[sentence],
        )
    )
    with pytest.raises(OperatorError, match=sentence):
        function(*arguments)


# ---- in a model ------------------------------------------------------------------------------------------------------


class Calls:
    """Counts those of the operators, made through the module that uses them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.norms = self.tables = 0
        monkeypatch.setattr("autoq.nn.around.norm", self._norm)
        monkeypatch.setattr("autoq.nn.around.rotary_tables", self._tables)

    def _norm(self, *arguments: Any) -> Tensor:
        self.norms += 1
        return model_ops.norm(*arguments)

    def _tables(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        self.tables += 1
        return model_ops.rotary_tables(*arguments)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def around(model: nn.Module) -> list[nn.Module]:
    """The modules that have another's forward, blocks aside."""
    blocks = architecture_of(model.config).decoder_blocks(model)
    return [
        each
        for each in model.modules()
        if isinstance(each.__dict__.get("forward"), StandIn) and each not in set(blocks)
    ]


def test_only_what_gains_is_replaced() -> None:
    """Torch has an operator for layer norms, and some positions are no tables."""
    for family in VARIANTS:
        leaves = {"norm", "rotary_emb"} if family.name.startswith(("llama", "mistral", "qwen")) else set()
        if family.config.model_type == "falcon":
            leaves = {"rotary_emb"}  # which the models with alibi have too
        model = quantized(family).model
        assert {name.rpartition(".")[2] for name, each in model.named_modules() if each in around(model)} == leaves


@pytest.mark.parametrize("family", ROTARY, ids=lambda family: family.name)
def test_models_give_what_they_gave(family: Variant, calls: Calls) -> None:
    model = quantized(family).model
    plain = copy.deepcopy(model)
    unfuse_blocks(plain)
    assert not around(plain)
    ids = torch.tensor([[5, 6, 7, 8], [9, 9, 3, 4]])
    with torch.no_grad():
        expected = plain(ids).logits
        assert (calls.norms, calls.tables) == (0, 0)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (calls.norms, calls.tables) == (int(family is LLAMA), 1)


def test_gradients_and_autocast_go_through_the_modules(calls: Calls) -> None:
    model = quantized(LLAMA).model
    ids = torch.tensor([[5, 6, 7]])
    model(ids).logits.square().sum().backward()
    assert model.model.norm.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert (calls.norms, calls.tables) == (0, 0)


def test_weights_of_another_dtype_and_hooks_are_obeyed(calls: Calls) -> None:
    model = quantized(LLAMA, dtype=torch.bfloat16).model
    ids = torch.tensor([[5, 6, 7]])
    seen = []
    handle = model.model.norm.register_forward_hook(lambda _module, _args, output: seen.append(output) or 2 * output)
    with torch.no_grad():
        doubled = model(ids).logits
        handle.remove()
        torch.testing.assert_close(doubled, 2 * model(ids).logits)
        assert (len(seen), calls.norms) == (1, 2)
        model.model.norm.float()
        assert model.model.norm(torch.randn(1, 64).bfloat16()).dtype == torch.float32
    assert calls.norms == 2


ROPES = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},  # scales the tables themselves
    "llama3": {
        "factor": 4.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
    "dynamic": {"factor": 4.0},  # depends on how many positions there are
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_every_kind_of_rotary_positions(kind: str, calls: Calls) -> None:
    config = copy.deepcopy(LLAMA.config)
    config.max_position_embeddings = 64
    config.rope_parameters = {"rope_theta": 10000.0, "rope_type": kind, **ROPES[kind]}
    model = quantized(Variant("rope", config)).model
    plain = copy.deepcopy(model)
    unfuse_blocks(plain)
    ids = torch.randint(3, 60, (1, 24))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert calls.tables == int(kind != "dynamic")


def test_positions_that_the_operator_does_not_take(calls: Calls) -> None:
    module = quantized(LLAMA).model.model.rotary_emb
    x, positions = torch.randn(1, 5, 64), torch.arange(5)[None]
    with torch.no_grad():
        expected = module(x, positions)
        assert calls.tables == 1
        for given in (positions.int(), positions.float()):
            torch.testing.assert_close(module(x, given), expected)
        assert module(x.double(), positions)[0].dtype == torch.float64
        module.inv_freq = module.inv_freq.double()
        torch.testing.assert_close(module(x, positions), expected)
    assert calls.tables == 1


class ShiftedNorm(LlamaRMSNorm):  # type: ignore[misc]
    """Of somebody who has another formula."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        shifted: Tensor = super().forward(hidden_states) + 1
        return shifted


def test_others_formulas_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(LLAMA).model
    unfuse_blocks(model)
    model.model.norm.__class__ = ShiftedNorm
    fuse_blocks(model)
    assert around(model) == [model.model.rotary_emb]
    unfuse_blocks(model)
    rotary = type(model.model.rotary_emb)
    monkeypatch.setattr(rotary, "forward", lambda self, x, position_ids: (position_ids, position_ids))
    fuse_blocks(model)
    assert around(model) == []


def test_a_model_without_these_parts_is_fused_all_the_same() -> None:
    model = quantized(LLAMA).model
    unfuse_blocks(model)
    model.model.last = model.model.norm
    del model.model.norm
    assert fuse_blocks(model) == len(model.model.layers)
    assert around(model) == [model.model.rotary_emb]


@pytest.mark.parametrize("leaf", ["norm", "rotary_emb"])
def test_a_forward_of_somebody_else_is_left_alone(leaf: str) -> None:
    model = quantized(LLAMA).model
    unfuse_blocks(model)
    module = getattr(model.model, leaf)
    theirs = module.forward = type(module).forward.__get__(module)
    fuse_blocks(model)
    assert module.__dict__["forward"] is theirs
    unfuse_blocks(model)
    assert module.__dict__["forward"] is theirs


def test_an_epsilon_counts() -> None:
    x = torch.full((1, 4), 1e-3)
    found = model_ops.norm(x, None, None, NormKind.RMS, 3e-6)
    assert math.isclose(float(found[0, 0]), 1e-3 / math.sqrt(4e-6), rel_tol=1e-5)
