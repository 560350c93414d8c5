"""The operators against float64, for every instruction set that this processor runs, and the packed layout."""

from __future__ import annotations

import copy
import importlib
import mmap
import pickle
import subprocess
import sys
import time
import warnings
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import (
    BITS,
    CAPABILITIES,
    DTYPES,
    EXTENSION,
    SHAPES,
    TOLERANCE,
    exact_linear,
    make_input,
    make_weight,
    needs_extension,
    relative_error,
    run_linear,
)
from torch import Tensor
from torch.nn import functional

from autoq import extension, ops
from autoq.errors import OperatorError
from autoq.packed import PackedWeight, pack, unpack
from autoq.quantization.weight import QuantizedWeight, dequantize

# ---- the layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("out_features", "in_features", "group_size"), SHAPES)
def test_unpack_is_the_inverse_of_pack(out_features: int, in_features: int, group_size: int, bits: int) -> None:
    weight = make_weight(out_features, in_features, bits, group_size)
    again = unpack(pack(weight), bits, out_features, in_features, symmetric=False)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scales, weight.scales)
    assert again.zeros is not None
    assert torch.equal(again.zeros, weight.zeros)
    assert again.bits == bits


@pytest.mark.parametrize("out_features", [2048, 2176, 3968])  # one large page of codes, and parts of others
def test_weights_in_large_pages_are_tensors_like_others(out_features: int) -> None:
    weight = make_weight(out_features, 2048, 4, 128)
    packed = pack(weight)
    # Memory that torch has from elsewhere cannot grow.
    assert packed.codes.untyped_storage().resizable() != hasattr(mmap, "MADV_HUGEPAGE")
    again = pickle.loads(pickle.dumps(copy.deepcopy(packed)))
    found = unpack(again, 4, out_features, 2048, symmetric=False)
    assert torch.equal(found.codes, weight.codes)
    x = make_input(3, 2048)
    small = PackedWeight(*(tensor.clone() for tensor in packed))
    for each in (packed, again):
        assert torch.equal(*(ops.linear(x, those, None, 4, out_features) for those in (each, small)))


def test_weights_are_joined_where_they_are_or_copied() -> None:
    packed = pack(make_weight(2048, 2048, 4, 128))
    first, last = packed.split([1024, 1024])
    elsewhere = PackedWeight(*(tensor.clone() for tensor in last))
    for parts, copied in (([first, last], False), ([first, elsewhere], True), ([last, first], True)):
        joined = PackedWeight.joined(parts)
        for found, wanted, *pair in zip(joined, packed, *parts, strict=True):
            assert (found.data_ptr() != wanted.data_ptr()) == copied
            assert torch.equal(found, torch.cat(pair))


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_weights_pack_their_implied_zero(bits: int) -> None:
    weight = make_weight(18, 64, bits, 32)._replace(zeros=None)
    packed = pack(weight)
    assert (packed.zeros.transpose(1, 2).reshape(-1, 2)[:18] == 2 ** (bits - 1)).all()
    assert unpack(packed, bits, 18, 64, symmetric=True).zeros is None


def read_code(packed: PackedWeight, bits: int, row: int, column: int) -> int:
    """One code, read bit by bit from the words, as csrc/layout.h draws them."""
    block, lane = divmod(row, 16)
    unit, index = divmod(column, 32)
    words = [int(word) & 0xFFFFFFFF for word in packed.codes[block, unit, :, lane]]

    if bits == 3:
        half, place = divmod(index, 16)
        byte, code = divmod(place, 4)
        own, shared = words[half] >> 8 * byte, words[2] >> 8 * byte + 4 * half
        return [own % 8, (own >> 3) % 8, shared % 8, (own >> 6) % 4 + 4 * ((shared >> 3) % 2)][code]
    bit_string = sum(word << (32 * i) for i, word in enumerate(words))
    return (bit_string >> (bits * index)) % 2**bits


@pytest.mark.parametrize("bits", BITS)
def test_codes_lie_where_the_layout_says(bits: int) -> None:
    weight = make_weight(19, 70, bits, -1)
    packed = pack(weight)
    assert packed.codes.shape == (2, 3, bits, 16)
    for row in range(32):
        for column in range(96):
            inside = row < 19 and column < 70
            expected = int(weight.codes[row, column]) if inside else 0
            assert read_code(packed, bits, row, column) == expected


def test_scales_and_zeros_lie_where_the_layout_says() -> None:
    weight = make_weight(21, 64, 4, 16)
    packed = pack(weight)
    assert weight.zeros is not None
    for row in range(32):
        for group in range(4):
            place = (row // 16, group, row % 16)
            assert packed.scales[place] == (weight.scales[row, group] if row < 21 else 0)
            assert packed.zeros[place] == (weight.zeros[row, group] if row < 21 else 0)


# ---- dequantize ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("out_features", "in_features", "group_size"), SHAPES)
def test_dequantize_is_exact(out_features: int, in_features: int, group_size: int, bits: int, capability: str) -> None:
    weight = make_weight(out_features, in_features, bits, group_size)
    packed = pack(weight)
    for dtype in DTYPES:
        dense = ops.dequantize(packed, bits, out_features, in_features, dtype)
        assert torch.equal(dense, dequantize(weight, dtype))


def test_dequantize_rounds_ties_and_overflow_as_torch_does(capability: str) -> None:
    """Products of every 8-bit difference with scales from subnormal to the largest; fp16 overflows to infinity."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(6, 1)
    scales = torch.tensor([[2.0**-24], [2.0**-15], [0.01], [1.0], [300.0], [65504.0]]).half()
    zeros = torch.tensor([[0], [255], [128], [1], [127], [64]], dtype=torch.uint8)
    weight = QuantizedWeight(codes, scales, zeros, 8)
    for dtype in DTYPES:
        assert torch.equal(ops.dequantize(pack(weight), 8, 6, 256, dtype), dequantize(weight, dtype))


# ---- linear ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_linear(bits: int, dtype: torch.dtype, rows: int, capability: str) -> None:
    for out_features, in_features, group_size in [(40, 384, 128), (50, 160, 16), (33, 100, -1)]:
        weight = make_weight(out_features, in_features, bits, group_size)
        input = make_input(rows, in_features, dtype=dtype)
        for bias in (None, make_input(out_features, dtype=dtype, seed=2)):
            result = run_linear(input, weight, bias)
            assert result.dtype == dtype
            assert result.shape == (rows, out_features)
            assert relative_error(result, exact_linear(input, weight, bias)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 70), (torch.bfloat16, 600), (torch.float16, 70)])
def test_linear_with_many_rows_and_panels(dtype: torch.dtype, rows: int) -> None:
    """Sizes at which there are several panels of outputs, slices of columns and parts of rows, the last ones short."""
    weight = make_weight(1300, 1024, 4, 128)
    input, bias = make_input(rows, 1024, dtype=dtype), make_input(1300, dtype=dtype, seed=2)
    assert relative_error(run_linear(input, weight, bias), exact_linear(input, weight, bias)) < TOLERANCE[dtype]
    assert relative_error(run_linear(input, weight), exact_linear(input, weight)) < TOLERANCE[dtype]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 9),
    out_features=st.integers(1, 50),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([16, 32, 48, 80, 128, 256, 272]),
    whole_row=st.integers(0, 600),
    capability_index=st.integers(0, len(CAPABILITIES) - 1),
    seed=st.integers(0, 2**31),
)
def test_linear_on_random_shapes(
    bits: int,
    dtype: torch.dtype,
    rows: int,
    out_features: int,
    groups: int,
    group_size: int,
    whole_row: int,
    capability_index: int,
    seed: int,
) -> None:
    """`whole_row`, where it is not 0, stands for one group of that many columns, which need no alignment."""
    in_features = whole_row or groups * group_size
    weight = make_weight(out_features, in_features, bits, -1 if whole_row else group_size, seed)
    input = make_input(rows, in_features, dtype=dtype, seed=seed + 1)
    before = EXTENSION.cpu_capability() if EXTENSION else ""
    if EXTENSION:
        EXTENSION.set_cpu_capability(CAPABILITIES[capability_index])
    try:
        result = run_linear(input, weight)
        # Against the norms of what is summed: a sum that happens to cancel has no small relative error.
        scale = (input.double().norm() * dequantize(weight, torch.float64).norm()).clamp(min=1e-300)
        error = (result.double() - exact_linear(input, weight)).norm() / scale
        assert error < TOLERANCE[dtype]
        assert torch.equal(
            ops.dequantize(pack(weight), bits, out_features, in_features, dtype), dequantize(weight, dtype)
        )
    finally:
        if EXTENSION:
            EXTENSION.set_cpu_capability(before)


@pytest.mark.parametrize("rows", [0, 3])
def test_linear_keeps_leading_dimensions(rows: int) -> None:
    weight = make_weight(40, 64, 4, 32)
    for shape in [(64,), (rows, 64), (2, rows, 64), (1, 2, rows, 64)]:
        input = make_input(*shape)
        result = run_linear(input, weight)
        assert result.shape == (*shape[:-1], 40)
        assert relative_error(result, exact_linear(input, weight)) < 1e-6


def test_linear_takes_tensors_that_are_not_contiguous(capability: str) -> None:
    weight = make_weight(40, 64, 4, 32)
    packed = pack(weight)
    input, bias = make_input(64, 6), make_input(40, 2, seed=2)
    strided = PackedWeight(*(tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in packed))
    assert not strided.codes.is_contiguous()
    result = ops.linear(input.T, strided, bias[:, 1], 4, 40)
    assert relative_error(result, exact_linear(input.T, weight, bias[:, 1])) < 1e-6
    every_second = make_input(8, 64)[::2]
    assert relative_error(run_linear(every_second, weight), exact_linear(every_second, weight)) < 1e-6


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, bits: int, capability: str) -> None:
    weight = make_weight(50, 320, bits, 64)
    input = make_input(8, 320, dtype=dtype)
    alone = torch.cat([run_linear(row[None], weight) for row in input])
    if EXTENSION is None:
        pytest.skip("the reference multiplies with torch, whose results depend on the batch")
    for rows in (2, 3, 4, 5, 7, 8):
        assert torch.equal(run_linear(input[:rows], weight), alone[:rows])


@pytest.mark.skipif("amx" not in CAPABILITIES, reason="needs matrix units")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_with_matrix_units_sixteen_rows_are_few(dtype: torch.dtype, bits: int) -> None:
    """Every number of rows, and so of tiles, gives what each row gives alone."""
    assert EXTENSION is not None
    for group_size, in_features in [(16, 80), (64, 320), (128, 640), (-1, 600)]:
        weight, input = make_weight(50, in_features, bits, group_size), make_input(16, in_features, dtype=dtype)
        alone = torch.cat([run_linear(row[None], weight) for row in input])
        for rows in range(5, 17):
            assert torch.equal(run_linear(input[:rows], weight), alone[:rows])


@needs_extension
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_agree_bit_for_bit(dtype: torch.dtype, bits: int) -> None:
    assert EXTENSION is not None
    weight, bias = make_weight(50, 480, bits, 96), make_input(50, dtype=dtype, seed=2)
    input = make_input(7, 480, dtype=dtype)
    results = []
    before = EXTENSION.cpu_capability()
    for name in CAPABILITIES:
        EXTENSION.set_cpu_capability(name)
        results.append(run_linear(input, weight, bias))
    EXTENSION.set_cpu_capability(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("group_size", [128, -1])
def test_outliers_cost_no_precision(group_size: int, capability: str) -> None:
    """A channel a thousand times larger than the others, as language models have them."""
    weight = make_weight(64, 1024, 4, group_size)
    input = make_input(4, 1024)
    input[:, 100] *= 1000
    assert relative_error(run_linear(input, weight), exact_linear(input, weight)) < 1e-6
    # What the outlier does not reach must be precise by itself: other groups, when there are others.
    if group_size == 128:
        difference = run_linear(input, weight) - run_linear(input * (torch.arange(1024) < 128), weight)
        assert relative_error(difference, exact_linear(input * (torch.arange(1024) >= 128), weight)) < 1e-4


@needs_extension
@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("channels", [1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outliers_cost_others_no_precision(dtype: torch.dtype, channels: int, rows: int, capability: str) -> None:
    """Channels a thousand times larger than the others, with weights of zero: what is left are the others."""
    weight = make_weight(64, 512, 4, 128)
    assert weight.zeros is not None
    weight.codes[:, :channels] = weight.zeros[:, :1]
    input = make_input(rows, 512, dtype=dtype)
    input[rows // 2, :channels] *= 1000  # the other rows have none
    assert relative_error(run_linear(input, weight), exact_linear(input, weight)) < (
        3e-3 if dtype == torch.bfloat16 else 4e-4
    )


@pytest.mark.parametrize("magnitude", [0.0, 1e-25, 1e-10, 1e10, 1e28])
def test_any_magnitude(magnitude: float, capability: str) -> None:
    weight = make_weight(20, 256, 4, 64)
    input = make_input(2, 256) * magnitude
    assert relative_error(run_linear(input, weight), exact_linear(input, weight)) < 1e-6


def test_values_that_are_not_finite_stay_in_their_row(capability: str) -> None:
    weight = make_weight(20, 256, 4, 64)
    input = make_input(3, 256)
    clean = run_linear(input[1:2], weight)
    input[0, 10], input[2, 200] = float("nan"), float("inf")
    result = run_linear(input, weight)
    assert result[0].isnan().all()
    assert not result[2].isfinite().any()
    assert relative_error(result[1:2], clean.double()) < 1e-6


def test_the_number_of_threads_changes_nothing() -> None:
    weight, input = make_weight(600, 512, 4, 128), make_input(4, 512)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_linear(input, weight))
    torch.set_num_threads(before)
    if EXTENSION is not None:
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@needs_extension
def test_set_num_threads_is_obeyed() -> None:
    """With one thread, the calling thread does all the work of the process; with two, it does not."""
    weight, input = make_weight(2048, 1024, 4, 128), make_input(8, 1024)
    packed = pack(weight)
    before = torch.get_num_threads()

    def share_of_others(threads: int) -> float:
        torch.set_num_threads(threads)
        ops.linear(input, packed, None, 4, 2048)
        time.sleep(0.2)  # idle workers spin for a while after a parallel region
        process, own = time.process_time(), time.thread_time()
        for _ in range(50):
            ops.linear(input, packed, None, 4, 2048)
        process, own = time.process_time() - process, time.thread_time() - own
        return (process - own) / process

    try:
        assert share_of_others(1) < 0.1
        assert share_of_others(2) > 0.2
    finally:
        torch.set_num_threads(before)


# ---- autograd, fakes, compilation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype: torch.dtype) -> None:
    weight = make_weight(40, 96, 4, 32)
    input = make_input(2, 3, 96, dtype=dtype).requires_grad_()
    bias = make_input(40, dtype=dtype, seed=2).requires_grad_()
    upstream = make_input(2, 3, 40, dtype=dtype, seed=3)
    run_linear(input, weight, bias).backward(upstream)
    assert input.grad is not None
    assert bias.grad is not None
    expected = upstream.double() @ dequantize(weight, torch.float64)
    assert relative_error(input.grad, expected) < TOLERANCE[dtype]
    assert relative_error(bias.grad, upstream.double().sum((0, 1))) < TOLERANCE[dtype]


def test_the_gradient_is_the_slope() -> None:
    """The operator is linear, so a step of any size along any direction must change it as the gradient says."""
    weight = make_weight(24, 64, 3, 16)
    input, step = make_input(3, 64).requires_grad_(), make_input(3, 64, seed=5)
    upstream = make_input(3, 24, seed=6)
    (gradient,) = torch.autograd.grad(run_linear(input, weight), input, upstream)
    with torch.no_grad():
        change = run_linear(input + step, weight) - run_linear(input, weight)
    torch.testing.assert_close((gradient * step).sum(), (upstream * change).sum(), rtol=1e-4, atol=1e-5)


def test_autograd_keeps_only_the_packed_weight() -> None:
    packed = pack(make_weight(64, 256, 4, 64))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ops.linear(make_input(5, 256).requires_grad_(), packed, None, 4, 64)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in packed}


@pytest.mark.parametrize("bits", BITS)
def test_opcheck(bits: int) -> None:
    packed = pack(make_weight(40, 96, bits, 32))
    for dtype in DTYPES:
        input = make_input(3, 96, dtype=dtype).requires_grad_()
        torch.library.opcheck(torch.ops.autoq.linear.default, (input, *packed, None, bits, 40))
        torch.library.opcheck(torch.ops.autoq.dequantize.default, (*packed, bits, 40, 96, dtype))
    bias = make_input(40, seed=2)
    torch.library.opcheck(torch.ops.autoq.linear.default, (make_input(2, 2, 96), *packed, bias, bits, 40))
    many = make_input(9, 96, dtype=torch.bfloat16).requires_grad_()
    torch.library.opcheck(torch.ops.autoq.linear.default, (many, *packed, None, bits, 40, "int8"))


@pytest.mark.parametrize("gradients", [False, True])
def test_compile_makes_one_graph(gradients: bool) -> None:
    weight = make_weight(40, 96, 4, 32)
    packed = pack(weight)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(input: Tensor) -> Tensor:
        return torch.relu(ops.linear(input * 2, packed, None, 4, 40)) + 1

    input = make_input(3, 96)
    with torch.set_grad_enabled(gradients):
        result = layer(input)
    expected = torch.relu(exact_linear(input * 2, weight)) + 1
    assert relative_error(result, expected) < 1e-6


def test_fakes_tell_shapes_and_dtypes() -> None:
    packed = PackedWeight(*(tensor.to("meta") for tensor in pack(make_weight(40, 96, 4, 32))))
    result = ops.linear(torch.empty(2, 3, 96, dtype=torch.bfloat16, device="meta"), packed, None, 4, 40)
    assert (result.shape, result.dtype, result.device.type) == ((2, 3, 40), torch.bfloat16, "meta")
    dense = ops.dequantize(packed, 4, 40, 96, torch.float16)
    assert (dense.shape, dense.dtype, dense.device.type) == ((40, 96), torch.float16, "meta")


# ---- errors ----------------------------------------------------------------------------------------------------------

GOOD = {"input": make_input(2, 96), "bias": None, "bits": 4, "out_features": 40}
WRONG = {
    "input dtype": ({"input": make_input(2, 96).double()}, "input is torch.float64 but must be one of"),
    "input integer": ({"input": torch.ones(2, 96, dtype=torch.int32)}, "input is torch.int32"),
    "input scalar": ({"input": torch.tensor(1.0)}, "input has no dimension"),
    "input features": ({"input": make_input(2, 128)}, r"input has the shape \[2, 128\] but .* takes 65 to 96"),
    "input empty": ({"input": make_input(2, 0)}, r"input has the shape \[2, 0\] but .* takes 65 to 96"),
    "input device": ({"input": torch.empty(2, 96, device="meta")}, "input is on meta but the weight on cpu"),
    "mode": ({"mode": "int4"}, r"mode is 'int4' but must be one of \('exact', 'int8'\)"),
    "bits": ({"bits": 5}, "bits is 5 but must be one of"),
    "other bits": ({"bits": 8}, r"8 bits want \[3, 3, 8, 16\]"),
    "out_features": ({"out_features": 80}, r"80 output features, 96 input features and 4 bits want \[5, 3, 4, 16\]"),
    "no out_features": ({"out_features": 0}, r"a weight of shape \[0, 96\] is empty"),
    "bias shape": ({"bias": torch.ones(41)}, r"bias has the shape \[41\] but must have \[40\]"),
    "bias dtype": ({"bias": torch.ones(40).half()}, "bias is torch.float16 but must have the input's dtype"),
    "codes dtype": ({"codes": torch.zeros(3, 3, 4, 16)}, "codes are torch.float32 but must be torch.int32"),
    "codes shape": ({"codes": torch.zeros(3, 3, 64, dtype=torch.int32)}, r"codes have the shape \[3, 3, 64\]"),
    "scales dtype": ({"scales": torch.zeros(3, 3, 16)}, "scales are torch.float32 but must be torch.float16"),
    "scales shape": ({"scales": torch.zeros(3, 3, 8).half()}, r"scales have the shape \[3, 3, 8\]"),
    "zeros dtype": ({"zeros": torch.zeros(3, 3, 16).half()}, "zeros are torch.float16 but must be torch.uint8"),
    "zeros shape": ({"zeros": torch.zeros(2, 3, 16, dtype=torch.uint8)}, r"zeros have the shape \[2, 3, 16\]"),
    "groups differ": ({"zeros": torch.zeros(3, 1, 16, dtype=torch.uint8)}, "zeros have 1 groups but scales have 3"),
    "odd groups": (
        {"scales": torch.zeros(3, 4, 16).half(), "zeros": torch.zeros(3, 4, 16, dtype=torch.uint8)},
        "4 groups do not cut 96 input features into groups of a multiple of 16",
    ),
    "no groups": (
        {"scales": torch.zeros(3, 0, 16).half(), "zeros": torch.zeros(3, 0, 16, dtype=torch.uint8)},
        "0 groups do not cut 96",
    ),
    "scales device": ({"scales": torch.empty(3, 3, 16, device="meta").half()}, "scales on meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_linear_says_what_is_wrong(case: str) -> None:
    changes, sentence = WRONG[case]
    packed = pack(make_weight(40, 96, 4, 32))
    arguments = {**GOOD, **packed._asdict(), **changes}
    parts = PackedWeight(arguments.pop("codes"), arguments.pop("scales"), arguments.pop("zeros"))
    with pytest.raises(OperatorError, match=sentence):
        ops.linear(packed=parts, **arguments)
    # The operator itself refuses as well, in its own words, whoever calls it.
    with pytest.raises((RuntimeError, OperatorError)):
        torch.ops.autoq.linear(**{**arguments, **parts._asdict()})


@pytest.mark.parametrize("case", [case for case in WRONG if not case.startswith(("input", "bias", "mode"))])
def test_dequantize_says_what_is_wrong(case: str) -> None:
    changes, sentence = WRONG[case]
    packed = pack(make_weight(40, 96, 4, 32))
    arguments = {"bits": 4, "out_features": 40, **packed._asdict(), **changes}
    parts = PackedWeight(arguments.pop("codes"), arguments.pop("scales"), arguments.pop("zeros"))
    with pytest.raises(OperatorError, match=sentence):
        ops.dequantize(parts, in_features=96, **arguments)


def test_dequantize_refuses_other_dtypes() -> None:
    packed = pack(make_weight(40, 96, 4, 32))
    with pytest.raises(OperatorError, match=r"the dtype is torch.int8 but must be one of"):
        ops.dequantize(packed, 4, 40, 96, torch.int8)


def test_pack_says_what_is_wrong() -> None:
    weight = make_weight(40, 96, 4, 32)
    assert weight.zeros is not None
    wrong = [
        (weight._replace(bits=5), "bits is 5"),
        (weight._replace(codes=weight.codes.int()), r"codes are torch.int32 \[40, 96\] but must be torch.uint8"),
        (weight._replace(codes=weight.codes[0]), r"codes are torch.uint8 \[96\]"),
        (weight._replace(codes=weight.codes + 1), "a code is 16 but 4 bits hold at most 15"),
        (weight._replace(scales=weight.scales[:39]), r"scales have the shape \[39, 3\]"),
        (weight._replace(scales=weight.scales.float() * 1e8), "a scale is too large for torch.float16"),
        (weight._replace(zeros=weight.zeros[:, :2]), r"zeros \[40, 2\] but both must have \[40, groups\]"),
        (weight._replace(zeros=weight.zeros.int()), "zeros are torch.int32 but must be torch.uint8"),
        (make_weight(40, 96, 4, 8), "12 groups do not cut 96 input features into groups of a multiple of 16"),
    ]
    for weight, sentence in wrong:
        with pytest.raises(OperatorError, match=sentence):
            pack(weight)


# ---- the extension ---------------------------------------------------------------------------------------------------


@needs_extension
def test_kernels_are_chosen_by_name() -> None:
    assert EXTENSION is not None
    assert EXTENSION.cpu_capability() == CAPABILITIES[-1]
    with pytest.raises(
        ValueError, match="there are no mmx kernels; choose portable, neon, avx2, avx512, avx512_bf16 or amx"
    ):
        EXTENSION.set_cpu_capability("mmx")
    for name in {"neon", "avx2", "avx512", "avx512_bf16", "amx"} - set(CAPABILITIES):
        with pytest.raises(ValueError, match=f"this processor cannot run the {name} kernels"):
            EXTENSION.set_cpu_capability(name)
    assert EXTENSION.cpu_capability() == CAPABILITIES[-1]
    assert all(isinstance(present, bool) for present in EXTENSION.cpu_features().values())
    assert EXTENSION.build_info()["compiler"]


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["autoq._C"] = None
warnings.simplefilter("error")
import torch
from autoq import ops
from autoq.extension import extension_missing
from autoq.packed import pack
from autoq.quantization.weight import dequantize, quantize
assert extension_missing() == "is not installed", extension_missing()
torch.manual_seed(0)
warned = []
warnings.showwarning = lambda message, *_: warned.append(str(message))
warnings.simplefilter("always")
for bits in (2, 3, 4, 8):
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 4e-4)):
        weight = quantize(torch.randn(40, 96), bits, 32)
        packed, input, bias = pack(weight), torch.randn(3, 96).to(dtype), torch.randn(40).to(dtype)
        exact = input.double() @ dequantize(weight, torch.float64).T + bias.double()
        result = ops.linear(input, packed, bias, bits, 40)
        assert result.dtype == dtype and (result - exact).norm() / exact.norm() < bound
        assert ops.linear(input[:0], packed, bias, bits, 40).shape == (0, 40)
        assert torch.equal(ops.dequantize(packed, bits, 40, 96, dtype), dequantize(weight, dtype))
        torch.library.opcheck(torch.ops.autoq.linear.default, (input, *packed, bias, bits, 40))
        try:
            ops.linear(input.double(), packed, bias, bits, 40)
        except ops.OperatorError as error:
            assert "input is torch.float64" in str(error)
        else:
            raise AssertionError("a wrong dtype passed")
print(len(warned), warned[0])
"""


def test_everything_works_without_the_extension_and_says_so_once() -> None:
    process = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("1 autoq's native extension is not installed, so its operators run slowly.")
    assert "pip install --no-build-isolation ." in process.stdout


def test_an_extension_that_cannot_be_loaded_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError(f"{name}: undefined symbol: something")

    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", fail)
        problem = extension._load()
    assert problem == "cannot be loaded (autoq._C: undefined symbol: something)"
    monkeypatch.setattr(extension, "_problem", problem)
    monkeypatch.setattr(extension, "_warning", None)
    with pytest.warns(RuntimeWarning, match=r"cannot be loaded \(autoq._C: undefined symbol: something\)"):
        extension.warn_once(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extension.warn_once(torch.device("cpu"))


# ---- linears that are not quantized ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (3, 40), (130, 100), (67, 512)])
def test_dense_linear_agrees_with_float64(
    out_features: int, in_features: int, dtype: torch.dtype, capability: str
) -> None:
    weight = (torch.randn(out_features, in_features) / in_features**0.5).to(dtype)
    for rows, bias in ((1, None), (2, torch.randn(out_features).to(dtype)), (5, None), (40, None)):
        input = torch.randn(rows, in_features).to(dtype)
        exact = functional.linear(input.double(), weight.double(), None if bias is None else bias.double())
        found = torch.ops.autoq.dense_linear(input, weight, bias)
        assert found.dtype == dtype
        assert relative_error(found, exact) < (1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
        if EXTENSION is not None:  # a row does not depend on the others
            alone = [torch.ops.autoq.dense_linear(row, weight, bias) for row in input]
            assert torch.equal(torch.stack(alone), found)


def test_dense_linear_takes_what_torch_takes() -> None:
    weight, input = torch.randn(6, 8), torch.randn(2, 3, 8)
    with torch.no_grad():
        assert ops.dense_linear(input[:, :0], weight, None).shape == (2, 0, 6)
        torch.testing.assert_close(ops.dense_linear(input, weight, None), input @ weight.T)
        strided = torch.randn(8, 6).T, torch.randn(8, 2).T
        torch.testing.assert_close(ops.dense_linear(strided[1], strided[0], None), strided[1] @ strided[0].T)
        assert ops.dense_linear(input.double(), weight.double(), None).dtype == torch.float64
        with pytest.raises(RuntimeError):
            ops.dense_linear(input[..., :7], weight, None)
    weight.requires_grad_()
    ops.dense_linear(input, weight, None).sum().backward()
    assert weight.grad is not None
    torch.library.opcheck(torch.ops.autoq.dense_linear.default, (input, weight.detach(), torch.randn(6)))
