"""The CUDA kernels, compiled for the host and run on an emulated GPU (tests/cuda_host), against float64."""

from __future__ import annotations

import cuda_host
import pytest
import torch
from cuda_host import ORDERS, run
from operators import BITS, DTYPES, make_weight

from autoq import ops
from autoq.quantization.weight import dequantize

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
    packed = ops.pack(weight)
    for dtype in DTYPES:
        dense = torch.full((out_features, in_features), float("nan"), dtype=dtype)
        sizes = (bits, out_features, in_features, packed.scales.shape[1])
        run("host_dequantize", *packed, *sizes, dense, cuda_host.DTYPES[dtype])
        assert torch.equal(dense, dequantize(weight, dtype))
