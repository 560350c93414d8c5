"""The CUDA kernels of a decoder block's steps, run on the host, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import cuda_host
import pytest
import torch
from operators import error, exact_norm
from torch import Tensor
from torch.nn import functional

from autoq.architectures.base import HeadLayout, NormKind, RotaryKind
from autoq.block_ops import ActivationKind

pytestmark = pytest.mark.skipif(cuda_host.compiler() is None, reason="there is no C++ compiler")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of a result rounded once, beside the sums in fp32 that went before.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan).to(dtype) if dtype.is_floating_point else torch.full(shape, 99, dtype=dtype)


# ---- norms and elementwise steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NormKind)
def test_norms(dtype: torch.dtype, kind: NormKind) -> None:
    torch.manual_seed(0)
    # The longest does not fit what a thread keeps; odd ones have no wide accesses.
    for columns, residual, affine in ((8, False, True), (129, True, True), (520, True, False), (40000, True, True)):
        for order in cuda_host.ORDERS if columns < 1000 else ("ascending",):
            rows = 2
            first, last = random(rows, columns, dtype=dtype), random(rows, columns, dtype=dtype)
            weight, bias = (random(columns, dtype=dtype) if affine else None for _ in range(2))
            total = (first.float() + last.float()).to(dtype) if residual else first
            expected = exact_norm(total, weight, bias, kind, 1e-5)
            output = poisoned(rows, columns, dtype=dtype)
            given = last.clone() if residual else None
            # The sum takes the place of its second term, as in the operator.
            cuda_host.run(
                "host_norm", first, given, given, weight, bias, output, int(kind), 1e-5, cuda_host.DTYPES[dtype],
                rows, columns, order=order,
            )  # fmt: skip
            assert error(output, expected) < TOLERANCE[dtype]
            if given is not None:
                assert torch.equal(given, total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_tables(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 77, 4095, 131071])
    for angles in (1, 32, 300):
        frequencies = 10000.0 ** (-torch.arange(angles) / angles)
        cosines, sines = (poisoned(5, 2 * angles, dtype=dtype) for _ in range(2))
        cuda_host.run(
            "host_rotary_tables", positions, 5, frequencies, angles, 1.25, cuda_host.DTYPES[dtype], cosines, sines
        )
        exact = (positions[:, None].float() * frequencies).double()
        assert error(cosines, 1.25 * torch.cat((exact, exact), 1).cos()) < TOLERANCE[dtype]
        assert error(sines, 1.25 * torch.cat((exact, exact), 1).sin()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for count in (1, 8, 1024, 1001):
        for third in (None, random(count, dtype=dtype)):
            first, second = random(count, dtype=dtype), random(count, dtype=dtype)
            output = second.clone()
            expected = first.float() + second.float() + (0 if third is None else third.float())
            cuda_host.run("host_add", first, output, third, output, cuda_host.DTYPES[dtype], count)
            assert torch.equal(output, expected.to(dtype))


ACTIVATIONS = {
    ActivationKind.RELU: functional.relu,
    ActivationKind.SILU: functional.silu,
    ActivationKind.GELU: functional.gelu,
    ActivationKind.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    ActivationKind.QUICK_GELU: lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ActivationKind)
def test_activations(dtype: torch.dtype, kind: ActivationKind) -> None:
    torch.manual_seed(0)
    for columns, gated, scaled in ((80, True, True), (88, False, True), (33, True, False), (7, False, False)):
        rows = 3
        up = (3 * torch.randn(rows, 2 * columns if gated else columns)).to(dtype)
        scales = (torch.rand(columns) + 0.5).to(dtype) if scaled else None
        expected = ACTIVATIONS[kind](up[:, :columns].double())
        expected = expected * up[:, columns:].double() if gated else expected
        expected = expected if scales is None else expected / scales.double()
        output = poisoned(rows, columns, dtype=dtype) if gated else up
        cuda_host.run("host_activate", int(kind), gated, up, scales, output, cuda_host.DTYPES[dtype], rows, columns)
        assert error(output, expected) < TOLERANCE[dtype]


# ---- attention -------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """An attention; the defaults are those of a small Llama with grouped heads."""

    heads: HeadLayout = field(default_factory=lambda: HeadLayout.consecutive(4, 2, 16))
    dtype: torch.dtype = torch.float32
    batch: int = 2
    tokens: int = 1
    past: int = 9
    spare: int = 5  # room in the caches behind the new tokens
    rotary: RotaryKind = RotaryKind.HALVES
    angles: int = 0  # 0: half a head
    rotary_batch: int = 1
    head_norms: bool = False
    clip: float = 0.0
    quantized: bool = False
    mask: torch.dtype | None = None
    inverted: bool = False
    bias: bool = False
    from_device: int | None = None  # the past is less than `past`, and on the device
    splits: int = 0  # 0: as many as the launcher wants

    def __str__(self) -> str:
        given = {name: value for name, value in self.__dict__.items() if value != Case.__dict__.get(name)}
        return ",".join(f"{name}={value}" for name, value in given.items() if name != "heads") or "plain"


class Attention:
    """The tensors of a case, what the kernels make of them, and what float64 does."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case, layout, dtype = case, case.heads, case.dtype
        self.held = case.past if case.from_device is None else case.from_device
        self.positions = case.past + case.tokens
        capacity = self.positions + case.spare
        self.qkv = random(case.batch, case.tokens, layout.row_size, dtype=dtype)
        shape = (case.batch, layout.kv_heads, capacity, layout.head_dim)
        self.caches = [random(*shape, dtype=dtype) for _ in range(2)]
        self.scales: list[Tensor | None] = [None, None]
        if case.quantized:
            self.caches = [torch.randint(-127, 128, shape, dtype=torch.int8) for _ in range(2)]
            self.scales = [torch.rand(shape[:3]) / 64 for _ in range(2)]
        for cache, scales in zip(self.caches, self.scales, strict=True):  # what is behind the held is not for reading
            behind = (scales if scales is not None else cache)[:, :, self.held :]
            behind.fill_(math.nan)
        self.angles = case.angles or layout.head_dim // 2
        turns = torch.rand(case.rotary_batch, case.tokens, self.angles) * 6
        if case.rotary == RotaryKind.HALVES:
            turns = torch.cat([turns, turns], -1)
        self.tables = [t.to(dtype) for t in (turns.cos(), turns.sin())] if case.rotary else [None, None]
        self.norms = [torch.rand(layout.head_dim).to(dtype) + 0.5 if case.head_norms else None for _ in range(2)]
        self.mask, self.bias = None, None
        if case.mask == torch.bool:
            self.mask = torch.rand(case.batch, 1, case.tokens, self.positions) > (0.7 if case.inverted else 0.3)
            self.mask[-1, :, 0] = case.inverted  # a query that may look nowhere
        elif case.mask is not None:
            self.mask = random(case.batch, 1, case.tokens, self.positions, dtype=case.mask)
        if case.bias:
            self.bias = random(1, layout.heads, 1, self.positions, dtype=dtype)
        self.length = None if case.from_device is None else torch.tensor([case.from_device])
        self.scale, self.epsilon = 0.3, 1e-6

    def settings(self) -> Tensor:
        case = self.case
        values = [
            *case.heads, cuda_host.DTYPES[case.dtype], case.batch, case.tokens, case.past, self.caches[0].shape[2],
            int(case.rotary), self.angles,
        ]  # fmt: skip
        table = self.tables[0]
        values += [0, 0] if table is None else [table.stride(0) if table.shape[0] > 1 else 0, table.stride(1)]
        for term, inverted in ((self.mask, case.inverted), (self.bias, False)):
            if term is None:
                values += [0] * 6
                continue
            strides = [0 if size == 1 else stride for size, stride in zip(term.shape, term.stride(), strict=True)]
            kind = 3 if term.dtype == torch.bool else cuda_host.DTYPES[term.dtype]
            values += [kind, int(inverted), *strides]
        return torch.tensor(values)

    def run(self, function: str, output: Tensor, other: Tensor, order: str) -> None:
        constants = torch.tensor([self.epsilon, self.case.clip, self.scale], dtype=torch.float32)
        cuda_host.run(
            function, self.qkv, *self.caches, *self.scales, *self.norms, *self.tables, self.mask, self.bias,
            self.length, output, other, self.case.splits, self.settings(), constants, order=order,
        )  # fmt: skip

    def attend(self, order: str = "ascending") -> Tensor:
        case = self.case
        output = poisoned(case.batch, case.tokens, case.heads.heads * case.heads.head_dim, dtype=case.dtype)
        rows = case.batch * case.tokens * case.heads.heads
        scratch = poisoned(rows * 128 * (case.heads.head_dim + 2), dtype=torch.float32)
        self.run("host_attend", output, scratch, order)
        return output

    # ---- float64 ----

    def head(self, start: int, norm: Tensor | None, turned: bool) -> Tensor:
        """`[batch, tokens, head_dim]`."""
        head = self.qkv[:, :, start : start + self.case.heads.head_dim].double()
        if self.case.clip:
            head = head.clamp(-self.case.clip, self.case.clip)
        if norm is not None:
            head = exact_norm(head, norm, None, NormKind.RMS, self.epsilon)
        if not turned or not self.case.rotary:
            return head
        n = self.angles
        cosines, sines = (table[..., :n].double() for table in self.tables)
        halves = self.case.rotary == RotaryKind.HALVES
        first, second = (slice(0, n), slice(n, 2 * n)) if halves else (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
        result = head.clone()
        result[..., first] = head[..., first] * cosines - head[..., second] * sines
        result[..., second] = head[..., second] * cosines + head[..., first] * sines
        return result

    def exact_terms(self) -> Tensor:
        """`[batch, heads, tokens, seen]`."""
        case, seen = self.case, self.held + self.case.tokens
        terms = torch.zeros(case.batch, case.heads.heads, case.tokens, seen, dtype=torch.float64)
        if self.bias is not None:
            terms += self.bias[..., :seen].double()
        if self.mask is None:
            future = torch.ones(case.tokens, seen, dtype=torch.bool).triu(self.held + 1)
            return terms.masked_fill(future, -math.inf)
        mask = self.mask[..., :seen]
        if mask.dtype == torch.bool:
            return terms.masked_fill(mask if case.inverted else ~mask, -math.inf)
        return terms + mask.double()

    def exact_caches(self) -> list[Tensor]:
        """Keys and values of all positions seen, `[batch, kv_heads, seen, head_dim]`."""
        layout, found = self.case.heads, []
        for i, (cache, scales) in enumerate(zip(self.caches, self.scales, strict=True)):
            wide = cache.double() if scales is None else cache.double() * scales.double()[..., None]
            start = layout.value if i else layout.key
            new = [self.head(start(g), None if i else self.norms[1], i == 0) for g in range(layout.kv_heads)]
            found.append(torch.cat([wide[:, :, : self.held], torch.stack(new, 1)], 2))
        return found

    def exact_queries(self) -> Tensor:
        """`[batch, heads, tokens, head_dim]`, scaled."""
        layout = self.case.heads
        heads = [self.head(layout.query(h), self.norms[0], True) for h in range(layout.heads)]
        return torch.stack(heads, 1) * self.scale

    def exact(self) -> Tensor:
        layout = self.case.heads
        keys, values = (c.repeat_interleave(layout.heads // layout.kv_heads, 1) for c in self.exact_caches())
        weights = (self.exact_queries() @ keys.transpose(2, 3) + self.exact_terms()).softmax(-1).nan_to_num(0)
        return (weights @ values).transpose(1, 2).flatten(2)


CASES = [
    *(Case(dtype=dtype, tokens=tokens) for dtype in DTYPES for tokens in (1, 3, 16)),
    *(Case(rotary=kind, angles=angles) for kind in RotaryKind for angles in (0, 3)),
    Case(rotary=RotaryKind.NONE, past=0, tokens=5),
    Case(rotary_batch=2, tokens=2),
    Case(head_norms=True, tokens=2),
    Case(clip=0.5),
    Case(mask=torch.bool, tokens=3),
    Case(mask=torch.bool, inverted=True, tokens=3),
    Case(mask=torch.bfloat16, tokens=2),
    Case(bias=True, dtype=torch.bfloat16),
    Case(bias=True, mask=torch.bool, tokens=2),
    Case(heads=HeadLayout.interleaved(4, 2, 16), tokens=2),
    # One key head for many queries, and for few; heads of many sizes, odd ones too.
    *(Case(heads=HeadLayout.consecutive(h, k, 8), dtype=torch.float16) for h, k in ((11, 1), (3, 3), (4, 1), (6, 2))),
    *(
        Case(HeadLayout.consecutive(2, 1, size), dtype, batch=1, rotary=RotaryKind.HALVES * (size > 1))
        for size, dtype in (
            (1, torch.float32), (20, torch.float16), (24, torch.float16), (80, torch.bfloat16), (128, torch.float16),
            (256, torch.float16), (512, torch.bfloat16), (1024, torch.float16), (256, torch.float32),
            (1024, torch.float32),
        )
    ),
    Case(from_device=4),
    Case(from_device=0, tokens=2),
    Case(from_device=9, mask=torch.bool),
    *(Case(past=200, splits=splits, dtype=torch.float16, from_device=150) for splits in (0, 1, 7, 128)),
    Case(past=150, tokens=9, splits=4),  # new tokens in two parts
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case) -> None:
    attention = Attention(case)
    before = [cache.clone() for cache in attention.caches]
    expected, caches = attention.exact(), attention.exact_caches()
    found = attention.attend()
    assert error(found, expected) < TOLERANCE[case.dtype]
    seen = attention.held + case.tokens
    for cache, old, wanted in zip(attention.caches, before, caches, strict=True):
        assert error(cache[:, :, attention.held : seen], wanted[:, :, attention.held :]) < TOLERANCE[case.dtype]
        for part in (slice(0, attention.held), slice(seen, None)):
            assert torch.equal(cache[:, :, part].nan_to_num(7), old[:, :, part].nan_to_num(7))


@pytest.mark.parametrize("order", cuda_host.ORDERS)
def test_no_order_of_threads_matters(order: str) -> None:
    case = Case(tokens=3, past=90, splits=3, head_norms=True, dtype=torch.float16)
    expected = Attention(case).exact()
    assert error(Attention(case).attend(order), expected) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("size", [16, 20, 128])
def test_attention_over_bytes(tokens: int, size: int) -> None:
    case = Case(HeadLayout.consecutive(4, 2, size), torch.bfloat16, tokens=tokens, past=70, splits=2, quantized=True)
    attention = Attention(case)
    exact_new = [cache[:, :, attention.held :] for cache in attention.exact_caches()]
    found = attention.attend()
    for cache, scales, exact in zip(attention.caches, attention.scales, exact_new, strict=True):
        new = slice(attention.held, attention.held + tokens)
        assert scales is not None
        torch.testing.assert_close(scales[:, :, new].double(), exact.abs().amax(-1) / 127, rtol=1e-5, atol=0)
        codes = exact / (exact.abs().amax(-1, keepdim=True) / 127)
        assert (cache[:, :, new] - codes).abs().max() < 0.501
    # What is in the cache is what the new tokens see, too.
    wide = [c.double() * s.double()[..., None] for c, s in zip(attention.caches, attention.scales, strict=True)]
    seen = attention.held + tokens
    attention.exact_caches = lambda: [cache[:, :, :seen] for cache in wide]  # type: ignore[method-assign]
    assert error(found, attention.exact()) < TOLERANCE[torch.bfloat16]


def test_a_head_that_is_not_finite_or_nothing_in_bytes() -> None:
    case = Case(dtype=torch.float32, quantized=True, rotary=RotaryKind.NONE, batch=1)
    attention = Attention(case)
    attention.qkv[0, 0, case.heads.key(0)] = math.inf
    attention.qkv[0, 0, case.heads.value(1) : case.heads.value(1) + 16] = 0
    output = attention.attend()
    assert output[0, 0, :32].isnan().all()
    assert output[0, 0, 32:].isfinite().all()
    assert (attention.caches[1][0, 1, attention.held] == 0).all()
    assert attention.scales[1] is not None
    assert attention.scales[1][0, 1, attention.held] == 0


def test_a_length_beyond_the_past_touches_nothing_outside() -> None:
    for length in (-5, 10**12):
        attention = Attention(Case(from_device=9, spare=0))
        attention.length = torch.tensor([length])
        attention.attend()  # the emulation watches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"mask": torch.bool, "inverted": True}, {"bias": True, "head_norms": True}, {"quantized": True}],
    ids=str,
)
def test_what_torchs_attention_is_given(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    case = Case(HeadLayout.consecutive(4, 2, 24), dtype, tokens=19, past=30, **changes)
    attention = Attention(case)
    exact, caches = attention.exact_queries(), attention.exact_caches()
    queries = poisoned(case.batch, case.tokens, 4, 24, dtype=dtype)
    terms = poisoned(case.batch, 4, case.tokens, case.past + case.tokens, dtype=dtype)
    attention.run("host_rotate", queries, terms, "ascending")
    assert error(queries.transpose(1, 2), exact) < TOLERANCE[dtype]
    wanted = attention.exact_terms()
    forbidden = wanted.isinf()
    assert (terms[forbidden] < -60000).all()
    torch.testing.assert_close(terms[~forbidden].double(), wanted[~forbidden], rtol=TOLERANCE[dtype], atol=1e-6)
    for cache, scales, wanted in zip(attention.caches, attention.scales, caches, strict=True):
        seen = case.past + case.tokens
        if scales is None:
            assert error(cache[:, :, :seen], wanted) < TOLERANCE[dtype]
            continue
        dense = poisoned(*cache.shape, dtype=dtype)
        cuda_host.run(
            "host_widen", cache, scales, dense, cuda_host.DTYPES[dtype], case.batch * 2, cache.shape[2], seen, 24
        )
        assert error(dense[:, :, :seen], wanted) < 8e-3
        assert dense[:, :, seen:].isnan().all()


def test_parts_fill_the_gpu_and_are_not_too_small() -> None:
    """Every launch of the cases above was checked; here the number of parts itself, by the scratch that is touched."""
    cuda_host.set_device(multiprocessors=132)
    try:
        for past, parts in ((50, 1), (639, 10)):
            attention = Attention(Case(past=past, batch=1))
            output = poisoned(1, 1, 64, dtype=torch.float32)
            scratch = poisoned(4 * 128 * 18, dtype=torch.float32)
            attention.run("host_attend", output, scratch, "ascending")
            touched = int((~scratch.isnan()).sum())
            assert touched == (0 if parts == 1 else 4 * parts * 18)
    finally:
        cuda_host.set_device()
