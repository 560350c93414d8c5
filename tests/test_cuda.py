"""The operators on a GPU, against float64; without one, the same kernels run in test_cuda_host.py."""

from __future__ import annotations

import pytest
import torch
from operators import BITS, DTYPES, SHAPES, exact_linear, make_input, make_weight, relative_error
from torch import Tensor
from torch.nn import functional

from autoq import ops
from autoq.nn import QuantLinear
from autoq.packed import PackedWeight, pack
from autoq.quantization.weight import QuantizedWeight, dequantize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
HALF_DTYPES = (torch.float16, torch.bfloat16)
# Rounding the result to the dtype; fp32 is multiplied by torch, with TF32 where that is on.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4}
# Beyond 256 rows the weight is rounded to the dtype too.
MANY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def exact_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS may add parts of a product in 16 bits, which costs more than the tolerances allow."""
    for dtype in ("fp16", "bf16"):
        monkeypatch.setattr(torch.backends.cuda.matmul, f"allow_{dtype}_reduced_precision_reduction", False)


def on_gpu(weight: QuantizedWeight) -> PackedWeight:
    return PackedWeight(*(tensor.cuda() for tensor in pack(weight)))


def run(input: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """The product on the GPU, back on the CPU."""
    moved = None if bias is None else bias.cuda()
    return ops.linear(input.cuda(), on_gpu(weight), moved, weight.bits, weight.codes.shape[0]).cpu()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_exact(dtype: torch.dtype, bits: int) -> None:
    for out_features, in_features, group_size in [*SHAPES, (1000, 1536, 128)]:
        weight = make_weight(out_features, in_features, bits, group_size)
        dense = ops.dequantize(on_gpu(weight), bits, out_features, in_features, dtype)
        assert torch.equal(dense.cpu(), dequantize(weight, dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_for_odd_shapes(dtype: torch.dtype, bits: int) -> None:
    for out_features, in_features, group_size in SHAPES:
        weight = make_weight(out_features, in_features, bits, group_size)
        for rows in (1, 5, 20):
            input, bias = make_input(rows, in_features, dtype=dtype), make_input(out_features, dtype=dtype, seed=2)
            # Against the norms of what is summed: a sum that happens to cancel has no small relative error.
            scale = input.double().norm() * dequantize(weight, torch.float64).norm() + bias.double().norm()
            error = (run(input, weight, bias).double() - exact_linear(input, weight, bias)).norm() / scale
            assert error < MANY_TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 200, 256, 257, 1000])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_linear_for_any_number_of_rows(dtype: torch.dtype, rows: int) -> None:
    for out_features, in_features in [(4096, 4096), (6144, 4096), (4100, 1000), (96, 14336)]:
        weight = make_weight(out_features, in_features, 4, 128 if in_features % 128 == 0 else -1)
        input = make_input(rows, in_features, dtype=dtype)
        tolerance = (TOLERANCE if rows <= 256 else MANY_TOLERANCE)[dtype]
        dense = dequantize(weight, torch.float64).cuda()
        assert relative_error(run(input, weight).cuda(), input.double().cuda() @ dense.T) < tolerance


@pytest.mark.parametrize("group_size", [16, 32, 64, 96, 128, 256, 768, -1])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_linear_for_any_bits_and_groups(dtype: torch.dtype, bits: int, group_size: int) -> None:
    weight = make_weight(480, 2304, bits, group_size)
    bias = make_input(480, dtype=dtype, seed=2)
    for rows in (1, 12, 30, 60):
        input = make_input(rows, 2304, dtype=dtype)
        tolerance = (MANY_TOLERANCE if group_size == 16 else TOLERANCE)[dtype]
        assert relative_error(run(input, weight, bias), exact_linear(input, weight, bias)) < tolerance


@pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("rows", [1, 17, 33, 64, 65, 128, 256])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_warpgroups(dtype: torch.dtype, rows: int) -> None:
    """The kernel that `linear` does not choose by itself yet, with whole tiles and shared ones."""
    for out_features, in_features, group_size in [
        (4096, 4096, 128),
        (4100, 1000, -1),
        (96, 14336, 128),
        (200, 544, 32),
    ]:
        weight = make_weight(out_features, in_features, 4, group_size)
        packed = on_gpu(weight)
        input = make_input(rows, in_features, dtype=dtype).cuda()
        expected = input.double() @ dequantize(weight, torch.float64).cuda().T
        for blocks, whole_tiles in ((264, False), (132, False), (32, True)):
            plan = (8, 4, 1, blocks, whole_tiles, True)
            results = [torch.ops.autoq.linear_with_plan(input, *packed, 4, out_features, *plan) for _ in range(3)]
            assert relative_error(results[0], expected) < TOLERANCE[dtype]
            assert all(torch.equal(result, results[0]) for result in results)


def test_no_worse_than_cublas_on_the_dense_weight() -> None:
    weight = make_weight(4096, 4096, 4, 128)
    dense = dequantize(weight, torch.float64).cuda()
    for dtype in HALF_DTYPES:
        for rows in (1, 16, 64, 256, 512):
            input = make_input(rows, 4096, dtype=dtype)
            expected = input.cuda().double() @ dense.T
            cublas = relative_error(functional.linear(input.cuda(), dense.to(dtype)), expected)
            assert relative_error(run(input, weight).cuda(), expected) <= 1.1 * cublas


def test_layouts_of_the_input() -> None:
    weight = make_weight(40, 64, 4, 32)
    packed = on_gpu(weight)
    long = make_input(1 + 6 * 64, dtype=torch.float16).cuda()
    unaligned, transposed = long[1:].view(6, 64), long[:-1].view(64, 6).T
    for input in (unaligned, transposed, unaligned[::2], unaligned.view(2, 3, 64), unaligned[0], unaligned[:0]):
        result = ops.linear(input, packed, None, 4, 40)
        assert result.shape == (*input.shape[:-1], 40)
        if input.numel():
            assert relative_error(result.cpu(), exact_linear(input.cpu(), weight)) < TOLERANCE[torch.float16]


def test_results_do_not_change_from_run_to_run() -> None:
    weight = make_weight(6144, 4096, 4, 128)
    packed = on_gpu(weight)
    for rows in (1, 16, 64):
        input = make_input(rows, 4096, dtype=torch.float16).cuda()
        first = ops.linear(input, packed, None, 4, 6144)
        assert all(torch.equal(first, ops.linear(input, packed, None, 4, 6144)) for _ in range(50))


def test_streams_do_not_disturb_each_other() -> None:
    """Tiles that several blocks share, on several streams at the same time."""
    weight = make_weight(6144, 4096, 4, 128)
    packed, input = on_gpu(weight), make_input(4, 4096, dtype=torch.float16).cuda()
    expected = ops.linear(input, packed, None, 4, 6144)
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(ops.linear(input, packed, None, 4, 6144))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_graphs_capture_and_replay() -> None:
    weights = [make_weight(6144, 4096, 4, 128, seed) for seed in range(2)]
    packed = [on_gpu(weight) for weight in weights]
    input = make_input(4, 4096, dtype=torch.float16).cuda()
    for one in packed:
        ops.linear(input, one, None, 4, 6144)
    graphs, results = [], []
    for one in packed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(ops.linear(input, one, None, 4, 6144))
        graphs.append(graph)
    input.copy_(make_input(4, 4096, dtype=torch.float16, seed=7))
    expected = [ops.linear(input, one, None, 4, 6144) for one in packed]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(10):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(result, other) for result, other in zip(results, expected, strict=True))


def test_nothing_waits_for_the_gpu() -> None:
    weight = make_weight(6144, 4096, 4, 128)
    packed, input = on_gpu(weight), make_input(300, 4096, dtype=torch.float16).cuda()
    ops.linear(input[:4], packed, None, 4, 6144)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.linear(input[:4], packed, None, 4, 6144)
        ops.linear(input, packed, None, 4, 6144)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradients() -> None:
    weight = make_weight(48, 96, 4, 32)
    input = make_input(2, 3, 96, dtype=torch.float16).cuda().requires_grad_()
    upstream = make_input(2, 3, 48, dtype=torch.float16, seed=3)
    ops.linear(input, on_gpu(weight), None, 4, 48).backward(upstream.cuda())
    assert input.grad is not None
    expected = upstream.double() @ dequantize(weight, torch.float64)
    assert relative_error(input.grad.cpu(), expected) < MANY_TOLERANCE[torch.float16]


@pytest.mark.parametrize("bits", BITS)
def test_opcheck(bits: int) -> None:
    packed = on_gpu(make_weight(40, 96, bits, 32))
    for dtype in DTYPES:
        input = make_input(3, 96, dtype=dtype).cuda().requires_grad_()
        torch.library.opcheck(torch.ops.autoq.linear.default, (input, *packed, None, bits, 40))
        torch.library.opcheck(torch.ops.autoq.dequantize.default, (*packed, bits, 40, 96, dtype))


def test_modules_move_there_and_back() -> None:
    weight = make_weight(40, 96, 4, 32)
    module = QuantLinear.from_weight(weight)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    input = make_input(3, 96, dtype=torch.float16)
    assert relative_error(module.cuda()(input.cuda()).cpu(), exact_linear(input, weight)) < TOLERANCE[torch.float16]
    after = module.cpu().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_devices_must_agree() -> None:
    packed = on_gpu(make_weight(40, 96, 4, 32))
    with pytest.raises(ops.OperatorError, match="input is on cpu but the weight on cuda:0"):
        ops.linear(make_input(2, 96), packed, None, 4, 40)
    with pytest.raises(ops.OperatorError, match="bias is on cpu but the input on cuda:0"):
        ops.linear(make_input(2, 96).cuda(), packed, make_input(40), 4, 40)
