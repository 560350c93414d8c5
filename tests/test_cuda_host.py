"""The CUDA kernels, compiled for the host and run on an emulated GPU (tests/cuda_host), against float64."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import cuda_host
import pytest
import torch
from cuda_host import ORDERS, run
from operators import BITS, DTYPES, exact_linear, make_input, make_weight, relative_error
from torch import Tensor

from autoq.packed import pack
from autoq.quantization.weight import QuantizedWeight, dequantize

pytestmark = pytest.mark.skipif(cuda_host.compiler() is None, reason="there is no C++ compiler")

# ---- the emulation ---------------------------------------------------------------------------------------------------


def sum_neighbours(wait: bool, barrier: bool, order: str) -> bool:
    stages = torch.randint(0, 1000, (5, 64, 4), dtype=torch.int32)
    result = torch.empty(64, dtype=torch.int32)
    run("test_sum_neighbours", stages, result, 5, wait, barrier, order=order)
    return torch.equal(result, stages.sum((0, 2), dtype=torch.int32).roll(-32))


def test_asynchronous_copies_arrive_when_waited_for() -> None:
    assert all(sum_neighbours(True, True, order) for order in ORDERS)
    assert not any(sum_neighbours(False, True, order) for order in ORDERS)


def test_a_missing_barrier_shows_in_some_order() -> None:
    assert not sum_neighbours(True, False, "ascending")


def test_accesses_outside_of_the_buffers_are_found() -> None:
    stages, result = torch.zeros(5, 64, 4, dtype=torch.int32), torch.empty(64, dtype=torch.int32)
    with pytest.raises(AssertionError, match=r"a read of 16 bytes outside the buffers, at argument 0 \+ (5|6)\d{3}"):
        run("test_sum_neighbours", stages, result, 6, True, True)
    with pytest.raises(AssertionError, match=r"a write of 4 bytes outside the buffers, at argument 1 \+ 2[4-5]\d"):
        run("test_sum_neighbours", stages, result[:60], 5, True, True)


def test_fragments_of_the_tensor_cores() -> None:
    """Where PTX says that the elements of a matrix product lie: a pair of lane 4g + t is row or column g."""
    a, b = torch.randn(16, 16).half(), torch.randn(16, 8).half()
    fragments_a, fragments_b = torch.empty(32, 8).half(), torch.empty(32, 4).half()
    expected, found = torch.empty(32, 4), torch.empty(32, 4)
    product = a.double() @ b.double()
    for lane in range(32):
        g, t = divmod(lane, 4)
        places = [(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]
        fragments_a[lane] = torch.cat([a[row, k : k + 2] for row, k in places])
        fragments_b[lane] = torch.cat([b[k : k + 2, g] for k in (2 * t, 2 * t + 8)])
        expected[lane] = torch.cat([product[row, 2 * t : 2 * t + 2] for row in (g, g + 8)])
    run("test_matrix_product", fragments_a, fragments_b, found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def multiply_warpgroup(a: Tensor, b: Tensor, wait: bool = True, told: int = 2048) -> Tensor:
    """a b^T of 64 x 16 by 64 x 16, of which b is copied in bulk; `told` bytes are announced, and what is there before
    the product is 1."""
    found = torch.empty(64, 64)
    # Pieces of 8 x 8: first those of the left half, from above; then those of the right one.
    pieces = b.view(8, 8, 2, 8).permute(2, 0, 1, 3).contiguous()
    run("test_warpgroup_product", a, pieces, found, wait, told)
    return found


def test_products_of_a_warpgroup() -> None:
    a, b = torch.randn(64, 16).half(), torch.randn(64, 16).half()
    expected = (a.double() @ b.double().T).float()
    torch.testing.assert_close(multiply_warpgroup(a, b), 1 + 2 * expected, rtol=1e-5, atol=1e-5)
    assert multiply_warpgroup(a, b, wait=False).isnan().all()  # nothing is there until it is waited for
    with pytest.raises(AssertionError, match="threads wait for each other in vain"):
        multiply_warpgroup(a, b, told=1024)


def test_shuffles_and_waiting_in_vain() -> None:
    values = torch.randn(32)
    total = values.sum()
    run("test_warp_sum", values, False)
    torch.testing.assert_close(values, total.expand(32))
    with pytest.raises(AssertionError, match="threads wait for each other in vain"):
        run("test_warp_sum", values, True)


@pytest.mark.parametrize("order", ORDERS)
def test_named_barriers_and_shared_memory(order: str) -> None:
    result = torch.empty(32)
    run("test_hand_over", result, True, 128, order=order)
    assert torch.equal(result, torch.arange(31, -1, -1).float())
    with pytest.raises(AssertionError, match="threads wait for each other in vain"):
        run("test_hand_over", result, False, 128, order=order)
    with pytest.raises(AssertionError, match="a write behind the end of shared memory"):
        run("test_hand_over", result, True, 124, order=order)


# ---- dequantize ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size"),
    [(1, 1, -1), (17, 100, -1), (31, 64, 16), (48, 96, 48), (33, 256, 128)],
)
def test_dequantize_is_exact(out_features: int, in_features: int, group_size: int, bits: int) -> None:
    weight = make_weight(out_features, in_features, bits, group_size)
    packed = pack(weight)
    for dtype in DTYPES:
        dense = torch.full((out_features, in_features), float("nan"), dtype=dtype)
        sizes = (bits, out_features, in_features, packed.scales.shape[1])
        run("host_dequantize", *packed, *sizes, dense, cuda_host.DTYPES[dtype])
        assert torch.equal(dense, dequantize(weight, dtype))


# ---- linear ----------------------------------------------------------------------------------------------------------

HALF_DTYPES = (torch.float16, torch.bfloat16)
# What rounding a result to the dtype costs; everything before is exact, or fp32.
ROUNDING = {torch.float16: 3e-4, torch.bfloat16: 2.4e-3}


class Plan(NamedTuple):
    """csrc/cuda/linear.h"""

    row_tiles: int = 1
    warps_across: int = 1
    slices: int = 1
    blocks: int = 1
    whole_tiles: bool = False
    warpgroups: bool = False


def plan_for(weight: QuantizedWeight, rows: int) -> Plan:
    """The plan for the emulated GPU."""
    found = torch.empty(6, dtype=torch.int64)
    run("host_plan", weight.bits, *weight.codes.shape, weight.scales.shape[1], rows, found)
    return Plan(*found.tolist())


def workspace_for(plan: Plan, weight: QuantizedWeight, rows: int) -> int:
    """Bytes."""
    found = torch.empty(1, dtype=torch.int64)
    sizes = (weight.bits, *weight.codes.shape, weight.scales.shape[1], rows)
    run("host_workspace", *sizes, *map(int, plan), found)
    return int(found)


def run_linear(
    input: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    plan: Plan | None = None,
    order: str = "ascending",
    columns: int | None = None,
    overlaps: bool = False,
) -> Tensor:
    """The kernel's product; whatever it leaves unwritten is NaN, as is its workspace at the start."""
    out_features, in_features = weight.codes.shape
    rows = input.shape[0]
    if plan is None:
        plan = plan_for(weight, rows)
    if columns is not None:
        input = torch.nn.functional.pad(input, (0, columns - in_features))
    out = torch.full((rows, out_features), float("nan"), dtype=input.dtype)
    workspace = torch.full((workspace_for(plan, weight, rows) // 4,), float("nan"))
    counters = torch.zeros(plan.blocks, dtype=torch.int32)
    packed = pack(weight)
    sizes = (weight.bits, out_features, in_features, packed.scales.shape[1])
    problem = (input, cuda_host.DTYPES[input.dtype], rows, input.shape[1], bias, out)
    launch = (int(overlaps), workspace, counters, *map(int, plan))
    run("host_linear", *packed, *sizes, *problem, *launch, order=order)
    assert not counters.any()
    return out


def check_linear(weight: QuantizedWeight, rows: int, dtype: torch.dtype, plan: Plan | None = None) -> None:
    out_features, in_features = weight.codes.shape
    input, bias = make_input(rows, in_features, dtype=dtype), make_input(out_features, dtype=dtype, seed=2)
    result = run_linear(input, weight, bias, plan)
    assert relative_error(result, exact_linear(input, weight, bias)) < ROUNDING[dtype]


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 17, 33, 64, 70])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_linear_for_any_number_of_rows(dtype: torch.dtype, rows: int) -> None:
    cuda_host.set_device()
    check_linear(make_weight(80, 384, 4, 128), rows, dtype)


@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 192, 384, -1])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_linear_for_any_bits_and_groups(dtype: torch.dtype, bits: int, group_size: int) -> None:
    cuda_host.set_device()
    check_linear(make_weight(48, 768 if group_size != 192 else 576, bits, group_size), 3, dtype)


@pytest.mark.parametrize(("bits", "row_tiles"), [(bits, tiles) for bits in BITS for tiles in (1, 4)] + [(4, 2), (4, 8)])
def test_linear_for_any_bits_and_rows(bits: int, row_tiles: int) -> None:
    for dtype in HALF_DTYPES:
        check_linear(make_weight(64, 160, bits, 32), 8 * row_tiles - 1, dtype, Plan(row_tiles, 2, 2, 2))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", BITS)
def test_weights_that_are_loaded_ahead_change_nothing(bits: int, order: str) -> None:
    """Three stages are, of one tile and of several, also of tiles that differ in their rows."""
    for rows, in_features, plan in (
        (3, 1024, Plan(1, 2, 1, 2)),
        (3, 160, Plan(1, 1, 2, 3)),
        (3, 160, Plan(1, 1, 1, 1)),
        (11, 96, Plan(1, 1, 1, 1)),
        (3, 96, Plan(4, 1, 1, 4)),
    ):
        weight, input = make_weight(80, in_features, bits, 32), make_input(rows, in_features, dtype=torch.bfloat16)
        bias = make_input(80, dtype=torch.bfloat16, seed=2)
        result = run_linear(input, weight, bias, plan, order, overlaps=True)
        assert torch.equal(result, run_linear(input, weight, bias, plan))


@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size"),
    [(1, 8, -1), (5, 16, -1), (15, 40, -1), (17, 200, -1), (33, 96, 32), (50, 160, 160), (63, 544, 32), (66, 136, -1)],
)
@pytest.mark.parametrize("bits", [3, 4])
def test_linear_for_odd_shapes(bits: int, out_features: int, in_features: int, group_size: int) -> None:
    weight = make_weight(out_features, in_features, bits, group_size)
    for dtype in HALF_DTYPES:
        for plan in (Plan(1, 1, 4, 2), Plan(4, 2, 1, 1, whole_tiles=True)):
            check_linear(weight, 5, dtype, plan)


def test_linear_with_padded_columns() -> None:
    """A width that is no multiple of 8 comes with its rows padded by zeros."""
    weight = make_weight(20, 100, 4, -1)
    input = make_input(3, 100, dtype=torch.float16)
    for columns in (104, 128):
        result = run_linear(input, weight, columns=columns)
        assert relative_error(result, exact_linear(input, weight)) < ROUNDING[torch.float16]


PLANS = [
    Plan(blocks=1),
    Plan(blocks=3, slices=2),
    Plan(blocks=5, slices=4, warps_across=2),
    Plan(blocks=17, slices=1, warps_across=1),
    Plan(blocks=4, slices=8, whole_tiles=True),
    Plan(blocks=7, slices=2, row_tiles=2, warps_across=4),
    Plan(blocks=3, slices=3, warps_across=2),
    Plan(blocks=13, slices=1, row_tiles=4, warps_across=2),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("plan", PLANS)
def test_linear_for_any_division_of_the_work(plan: Plan, order: str) -> None:
    """More blocks than tiles, tiles shared by several blocks, slices without work; threads and blocks in any order."""
    weight = make_weight(130, 1100, 4, -1)
    input, bias = make_input(11, 1100, dtype=torch.float16), make_input(130, dtype=torch.float16, seed=2)
    result = run_linear(input, weight, bias, plan, order, columns=1104)
    assert relative_error(result, exact_linear(input, weight, bias)) < ROUNDING[torch.float16]
    # The order in which blocks come to a shared tile must not change a bit.
    assert torch.equal(result, run_linear(input, weight, bias, plan, columns=1104))


# ---- linear on warpgroups --------------------------------------------------------------------------------------------


def warpgroups(blocks: int = 2, whole_tiles: bool = False) -> Plan:
    return Plan(8, 4, 1, blocks, whole_tiles, warpgroups=True)


@pytest.mark.parametrize("rows", [1, 33, 64, 65, 130])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_warpgroups_for_any_number_of_rows(dtype: torch.dtype, rows: int) -> None:
    check_linear(make_weight(144, 384, 4, 128), rows, dtype, warpgroups())


@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256, -1])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_warpgroups_for_any_groups(dtype: torch.dtype, group_size: int) -> None:
    check_linear(make_weight(130, 768, 4, group_size), 40, dtype, warpgroups())


@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size"),
    [(1, 8, -1), (5, 16, -1), (17, 200, -1), (33, 96, 32), (50, 160, 160), (63, 544, 32), (300, 136, -1)],
)
def test_warpgroups_for_odd_shapes(out_features: int, in_features: int, group_size: int) -> None:
    weight = make_weight(out_features, in_features, 4, group_size)
    for plan in (warpgroups(3), warpgroups(1, whole_tiles=True)):
        check_linear(weight, 70, torch.float16, plan)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("plan", [warpgroups(1), warpgroups(5), warpgroups(40), warpgroups(3, whole_tiles=True)])
def test_warpgroups_for_any_division_of_the_work(plan: Plan, order: str) -> None:
    weight = make_weight(260, 1200, 4, -1)
    input, bias = make_input(70, 1200, dtype=torch.float16), make_input(260, dtype=torch.float16, seed=2)
    result = run_linear(input, weight, bias, plan, order)
    assert relative_error(result, exact_linear(input, weight, bias)) < ROUNDING[torch.float16]
    assert torch.equal(result, run_linear(input, weight, bias, plan))


def test_warpgroups_are_hoppers_and_for_4_bits() -> None:
    for bits, capability in ((3, (9, 0)), (8, (9, 0)), (4, (8, 0)), (4, (10, 0))):
        cuda_host.set_device(capability=capability)
        with pytest.raises(RuntimeError, match="there is no such plan"):
            workspace_for(warpgroups(), make_weight(16, 64, bits, 32), 40)
    cuda_host.set_device()


# ---- what all plans have in common -----------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_the_others() -> None:
    weight = make_weight(40, 256, 4, 64)
    input = make_input(6, 256, dtype=torch.float16)
    clean = run_linear(input, weight)
    input[0, 10], input[4, 200] = float("nan"), float("inf")
    result = run_linear(input, weight)
    assert result[0].isnan().all()
    assert not result[4].isfinite().any()
    assert torch.equal(result[[1, 2, 3, 5]], clean[[1, 2, 3, 5]])


def test_weights_are_not_rounded() -> None:
    """Codes less zeros times an input of few bits is exact, also where code times scale would not fit 16 bits."""
    weight = make_weight(32, 128, 8, -1)
    weight = weight._replace(scales=torch.full_like(weight.scales, 1 + 2**-10))
    input = torch.zeros(1, 128, dtype=torch.float16)
    input[0, 5] = 1
    result = run_linear(input, weight)
    assert torch.equal(result[0], exact_linear(input, weight)[0].half())


def test_plans_use_what_the_gpu_has() -> None:
    cuda_host.set_device(132, 227 * 1024)
    wide, square = make_weight(16, 4096, 4, 128), make_weight(4096, 32, 4, 32)
    assert plan_for(wide, 1).blocks > 1  # one tile, shared
    plan = plan_for(square, 1)
    assert (plan.blocks, plan.whole_tiles, workspace_for(plan, square, 1)) == (128, True, 0)
    for shared in (99, 163, 227):
        for multiprocessors in (1, 82, 132):
            cuda_host.set_device(multiprocessors, shared * 1024)
            for rows, bits in itertools.product((1, 8, 16, 32, 64, 100), BITS):
                check = make_weight(96, 512, bits, 128)
                plan = plan_for(check, rows)
                assert plan.blocks <= 2 * multiprocessors
                assert plan.row_tiles * 8 >= min(rows, 32) or (shared, bits) == (99, 8)
                most = plan.blocks * 2 * plan.warps_across * plan.row_tiles * 1024
                assert workspace_for(plan, check, rows) <= most
    cuda_host.set_device(8, 99 * 1024)
    check_linear(make_weight(160, 512, 4, 128), 64, torch.float16)
    cuda_host.set_device()
