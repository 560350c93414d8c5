"""On-disk formats: lossless, and laid out as they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoq import loading, ops
from autoq.errors import ConfigError
from autoq.formats import LinearSpec, all_formats, dense, gemm, get_format
from autoq.quantization.weight import QuantizedWeight, quantize

CASES = [
    (name, bits, group_size, shape)
    for name in all_formats()
    for bits in (2, 3, 4, 8)
    for group_size in (16, 32, 128, -1)
    for shape in ((8, 128), (24, 384), (40, 256), (5, 128), (13, 100), (8, 33))
    if group_size == -1 or shape[1] % group_size == 0
]


def _case(bits: int, group_size: int, shape: tuple[int, int], zero_point: bool) -> tuple[QuantizedWeight, LinearSpec]:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + bits))
    groups = shape[1] if group_size == -1 else group_size
    return quantize(weight, bits, group_size, zero_point), LinearSpec(*shape, bits, groups, zero_point)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(("name", "bits", "group_size", "shape"), CASES)
@pytest.mark.parametrize("zero_point", [True, False])
def test_round_trip(name: str, bits: int, group_size: int, shape: tuple[int, int], zero_point: bool) -> None:
    weight, spec = _case(bits, group_size, shape, zero_point)
    layout = get_format(name)
    if layout.obstacle(spec) is not None:
        assert bits != 4 or shape[0] % 8, "only gemm has obstacles, and only these"
        assert name == "gemm"
        return
    tensors = layout.pack(weight)
    assert {leaf: (tensor.dtype, tuple(tensor.shape)) for leaf, tensor in tensors.items()} == {
        leaf: tuple(wanted) for leaf, wanted in layout.tensors(spec).items()
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    result = layout.unpack(tensors, spec)
    assert _same(result.codes, weight.codes)
    assert _same(result.scales, weight.scales)
    assert _same(result.zeros, weight.zeros)
    assert result.bits == bits


def test_gemm_puts_column_c_in_its_nibble() -> None:
    weight, _spec = _case(4, 16, (16, 32), True)
    tensors = get_format("gemm").pack(weight)
    for k in range(32):
        for n in range(16):
            nibble = (0, 4, 1, 5, 2, 6, 3, 7)[n % 8]
            word = int(tensors["qweight"][k, n // 8]) & 0xFFFFFFFF
            assert word >> (4 * nibble) & 15 == weight.codes[n, k]
    assert torch.equal(tensors["scales"], weight.scales.T)
    assert weight.zeros is not None
    assert int(tensors["qzeros"][1, 0]) & 15 == weight.zeros[0, 1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dense_is_a_bit_stream_without_waste(bits: int) -> None:
    weight, _spec = _case(bits, -1, (3, 37), True)
    stream = get_format("dense").pack(weight)["qweight"]
    assert stream.shape[1] == (37 * bits + 7) // 8
    for row in range(3):
        number = int.from_bytes(bytes(stream[row].tolist()), "little")
        assert [number >> (bits * k) & (2**bits - 1) for k in range(37)] == weight.codes[row].tolist()


def test_gemm_writes_symmetric_zeros_out_and_reads_other_zeros_as_they_are() -> None:
    weight, spec = _case(4, 16, (8, 32), False)
    layout = get_format("gemm")
    tensors = layout.pack(weight)
    assert (tensors["qzeros"] == -0x77777778).all()  # 0x88888888
    tensors["qzeros"][0, 0] = 0
    zeros = layout.unpack(tensors, spec).zeros
    assert zeros is not None
    assert (zeros[:, 0] == 0).all()


def test_unknown_format() -> None:
    with pytest.raises(ConfigError, match="'marlin' is not supported; supported are dense, gemm"):
        get_format("marlin")


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (16, 32), (37, 88), (70, 200), (128, 1032)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_native_conversions_equal_their_reference(rows: int, columns: int, bits: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8)
    expected = ops._pack_codes(codes, bits)
    room = torch.full((expected.shape[0] + 2, *expected.shape[1:]), 77, dtype=torch.int32)
    torch.ops.autoq.pack_codes(codes, bits, room[1:-1])
    assert torch.equal(room[1:-1], expected)
    assert bool((room[0] == 77).all() and (room[-1] == 77).all())
    stream = dense._to_bit_stream(codes[:, : columns - 3], bits)
    assert torch.equal(torch.ops.autoq.unpack_bit_stream(stream, columns - 3, bits), codes[:, : columns - 3])
    words = torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int64).to(torch.int32)
    assert torch.equal(torch.ops.autoq.unpack_gemm_codes(words), gemm._unpack_columns(words).T)
    for some in (words[:, 2:5], words.T.contiguous().T):
        assert torch.equal(torch.ops.autoq.unpack_gemm_codes(some), gemm._unpack_columns(some).T)


@pytest.mark.parametrize(("name", "bits"), [("gemm", 4), ("dense", 3), ("dense", 4), ("dense", 8)])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("outputs", [8, 128, 304])
def test_some_outputs_at_a_time_are_all_of_them(
    outputs: int, zero_point: bool, name: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_CODES_OF_A_THREAD", 1)
    weight, spec = _case(bits, 32, (outputs, 96), zero_point)
    layout = get_format(name)
    tensors = layout.pack(weight)
    found = loading._pack_stored(tensors, spec, layout)
    for ours, expected in zip(found, ops.pack(layout.unpack(tensors, spec)), strict=True):
        assert torch.equal(ours, expected)


def test_conversions_refuse_what_they_cannot_read() -> None:
    with pytest.raises(RuntimeError):
        torch.ops.autoq.unpack_bit_stream(torch.zeros(2, 5, dtype=torch.uint8), 16, 3)
    if ops.extension_missing() is None:
        room = torch.zeros(1, 1, 4, 16, dtype=torch.int32)
        for arguments in ((torch.zeros(2, 2), 4), (torch.zeros(2, dtype=torch.uint8), 4)):
            with pytest.raises(RuntimeError, match="codes must be uint8 of two dimensions"):
                torch.ops.autoq.pack_codes(*arguments, room)
        with pytest.raises(RuntimeError, match="bits is 5"):
            torch.ops.autoq.pack_codes(torch.zeros(2, 8, dtype=torch.uint8), 5, room)
        for wrong in (room[:, :, :3], room.long(), room.transpose(2, 3), torch.cat((room, room))):
            with pytest.raises(RuntimeError, match=r"packed codes must be contiguous int32 \[1, 1, 4, 16\]"):
                torch.ops.autoq.pack_codes(torch.zeros(2, 8, dtype=torch.uint8), 4, wrong)
        with pytest.raises(RuntimeError, match="GEMM words must be int32"):
            torch.ops.autoq.unpack_gemm_codes(torch.zeros(2, 8))
