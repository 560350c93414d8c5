"""autoq's linear, torch's int4 kernel and torch's bf16 linear."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autoq import __version__, ops
from autoq.packed import PackedWeight, pack
from autoq.quantization.weight import QuantizedWeight, dequantize
from peers.matmul import Kernel, MatmulWorker, copies_beyond, load_weight

_Product = Callable[[Tensor], Tensor]


class _TorchKernel(Kernel):
    def __init__(self, products: list[_Product], size: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self._products, self._dtype = products, dtype
        self.bytes, self.copies = size, len(products)

    def prepare(self, x: np.ndarray, threads: int) -> None:
        torch.set_num_threads(threads)
        self._x = torch.from_numpy(x).to(self._dtype)

    def run(self, copies: int) -> Tensor:
        for product in self._products[:copies]:
            found = product(self._x)
        return found

    def output(self, copies: int) -> np.ndarray:
        return self.run(copies).float().numpy()


class TorchMatmul(MatmulWorker):
    """All of them in one process, since they share a runtime."""

    def __init__(self) -> None:
        torch.set_grad_enabled(False)

    def versions(self) -> dict[str, str]:
        return {"autoq": __version__, "torch": torch.__version__}

    def _kernels(self, folder: Path, cache_bytes: int) -> dict[str, Kernel]:
        codes, scales, zeros = (torch.from_numpy(part) for part in load_weight(folder, "asymmetric"))
        weight = QuantizedWeight(codes, scales, zeros, bits=4)
        dense = dequantize(weight, torch.bfloat16)
        kernels = _autoq_kernels(weight, cache_bytes)
        kernels["torch int4pack"] = _int4pack(weight, cache_bytes)
        bf16 = [_linear_bf16(dense.clone()) for _ in range(copies_beyond(cache_bytes, dense.nbytes))]
        kernels["torch bf16 linear"] = _TorchKernel(bf16, dense.nbytes)
        return kernels


def _autoq_kernels(weight: QuantizedWeight, cache_bytes: int) -> dict[str, Kernel]:
    """autoq in each mode that its linear has, with bf16 and fp32 activations."""
    first = pack(weight)
    size = sum(part.nbytes for part in first)
    packed = [PackedWeight(*(part.clone() for part in first)) for _ in range(copies_beyond(cache_bytes, size))]
    exact = [_autoq(one, len(weight.codes)) for one in packed]
    kernels: dict[str, Kernel] = {
        "autoq": _TorchKernel(exact, size),
        "autoq, fp32 activations": _TorchKernel(exact, size, torch.float32),
    }
    if "mode" in inspect.signature(ops.linear).parameters:
        int8 = [_autoq(one, len(weight.codes), mode="int8") for one in packed]
        kernels |= {
            "autoq int8": _TorchKernel(int8, size),
            "autoq int8, fp32 activations": _TorchKernel(int8, size, torch.float32),
        }
    return kernels


def _autoq(packed: PackedWeight, out_features: int, **options: str) -> _Product:
    return lambda x: ops.linear(x, packed, None, 4, out_features, **options)


def _linear_bf16(weight: Tensor) -> _Product:
    return lambda x: functional.linear(x, weight)


def _int4pack(weight: QuantizedWeight, cache_bytes: int) -> Kernel:
    """Its weight is `(q - 8) s + m` with s and m = (8 - z) s in bf16, which rounds them."""
    first = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 2)
    scales = weight.scales.float().T
    offsets = (8 - weight.explicit_zeros().float().T) * scales
    parameters = torch.stack([scales, offsets], dim=2).bfloat16().contiguous()

    def product(codes: Tensor) -> _Product:
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, weight.group_size, parameters)

    size = first.nbytes + parameters.nbytes
    return _TorchKernel([product(first.clone()) for _ in range(copies_beyond(cache_bytes, size))], size)
