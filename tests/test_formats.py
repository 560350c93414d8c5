"""On-disk formats: lossless, and laid out as they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autoq import packed
from autoq.errors import ConfigError
from autoq.extension import extension_missing
from autoq.formats import LinearSpec, all_formats, dense, gemm, get_format
from autoq.packed import PackedWeight, pack, unpack
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
    found = PackedWeight.empty(*shape, spec.groups, bits)
    for tensor in found:
        tensor.fill_(77)
    layout.repack(tensors, spec, found)
    for ours, expected in zip(found, pack(weight), strict=True):
        assert torch.equal(ours, expected)
    result = unpack(found, bits, *shape, symmetric=not zero_point)
    assert _same(result.codes, weight.codes)
    assert _same(result.scales, weight.scales)
    assert _same(result.zeros, weight.zeros)


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
    found = PackedWeight.empty(8, 32, 2, 4)
    layout.repack(tensors, spec, found)
    assert (found.zeros[0, 0, :8] == 0).all()
    assert (found.zeros[0, 1, :8] == 8).all()


def test_unknown_format() -> None:
    with pytest.raises(ConfigError, match="'marlin' is not supported; supported are dense, gemm"):
        get_format("marlin")


@pytest.fixture(params=[2**22, 2**9], ids=["at once", "some at a time"])
def _panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_REFERENCE_CODES", request.param)


def _room(rows: int, columns: int, bits: int) -> Tensor:
    """Codes of a packed weight, with a row block too many at either end."""
    return torch.full((-(-rows // 16) + 2, -(-columns // 32), bits, 16), 77, dtype=torch.int32)


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (16, 32), (37, 88), (70, 203), (128, 1032), (600, 96)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.usefixtures("_panels")
def test_codes_are_packed_as_the_reference_does(rows: int, columns: int, bits: int) -> None:
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    expected = _room(rows, columns, bits)
    expected[1:-1] = packed._pack_codes(codes, bits)
    for fill in (torch.ops.autoq.pack_codes, packed.reference_pack_codes):
        found = _room(rows, columns, bits)
        fill(codes, bits, found[1:-1])
        assert torch.equal(found, expected)
    stream = dense._to_bit_stream(codes, bits)
    stream[:, -1] |= 0xFF << (8 - -columns * bits % 8) & 0xFF  # what is behind the last code means nothing
    for fill in (torch.ops.autoq.repack_bit_stream, dense._repack_stream):
        found = _room(rows, columns, bits)
        fill(stream, columns, bits, found[1:-1])
        assert torch.equal(found, expected)


@pytest.mark.parametrize("inputs", [1, 8, 37, 96, 200])
@pytest.mark.parametrize("columns", [1, 2, 3, 16, 21, 40])
@pytest.mark.usefixtures("_panels")
def test_gemm_words_are_packed_as_the_reference_does(inputs: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(inputs)
    codes = torch.randint(16, (8 * columns, inputs), dtype=torch.uint8, generator=generator)
    expected = _room(*codes.shape, 4)
    expected[1:-1] = packed._pack_codes(codes, 4)
    words = gemm._pack_columns(codes.T)
    for fill in (torch.ops.autoq.repack_gemm_codes, gemm._repack_words):
        for same in (words, words.T.contiguous().T):
            found = _room(*codes.shape, 4)
            fill(same, found[1:-1])
            assert torch.equal(found, expected)


def test_conversions_refuse_what_they_cannot_read() -> None:
    if extension_missing() is not None:
        pytest.skip("the references are only called with what a checkpoint was checked to hold")
    room = torch.zeros(1, 1, 4, 16, dtype=torch.int32)
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    calls = {
        "pack_codes": (codes, 4),
        "repack_bit_stream": (codes, 16, 4),
        "repack_gemm_codes": (torch.zeros(8, 2, dtype=torch.int32),),
    }
    names = {"pack_codes": "codes", "repack_bit_stream": "a bit stream", "repack_gemm_codes": "GEMM words"}
    for name, (first, *others) in calls.items():
        fill = getattr(torch.ops.autoq, name)
        fill(first, *others, room)
        for wrong in (first.float(), first[0]):
            with pytest.raises(RuntimeError, match=f"{names[name]} must be u?int[0-9]* of two dimensions"):
                fill(wrong, *others, room)
        for wrong in (room[:, :, :3], room.long(), room.transpose(2, 3), torch.cat((room, room))):
            with pytest.raises(RuntimeError, match=r"packed codes must be contiguous int32 \[1, 1, 4, 16\]"):
                fill(first, *others, wrong)
    for name in ("pack_codes", "repack_bit_stream"):
        with pytest.raises(RuntimeError, match="bits is 5"):
            getattr(torch.ops.autoq, name)(*calls[name][:-1], 5, room)
    with pytest.raises(RuntimeError, match="16 codes of 3 bits take 6 bytes, not 8"):
        torch.ops.autoq.repack_bit_stream(codes, 16, 3, room)


@pytest.mark.parametrize("name", ["pack_codes", "repack_bit_stream", "repack_gemm_codes"])
def test_opcheck(name: str) -> None:
    room = torch.zeros(1, 1, 4, 16, dtype=torch.int32)
    arguments: dict[str, tuple[Any, ...]] = {
        "pack_codes": (torch.ones(2, 8, dtype=torch.uint8), 4, room),
        "repack_bit_stream": (torch.ones(2, 8, dtype=torch.uint8), 16, 4, room),
        "repack_gemm_codes": (torch.ones(8, 2, dtype=torch.int32), room),
    }
    torch.library.opcheck(getattr(torch.ops.autoq, name).default, arguments[name])
