"""Quantized weights in llama.cpp's blocks."""

from __future__ import annotations

import numpy as np

BLOCK = 32  # weights that share a scale


def blocks(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    """A weight as Q4_1, or as Q4_0 if it has no zeros: uint8 `[out, bytes of a row]`.

    codes: uint8 `[out, in]`; scales: fp16 `[out, groups]`, of groups of a multiple of 32; zeros: uint8, likewise.
    Q4_0 is `d (q - 8)` and Q4_1 `d q + m`, with d the scale and m = -zero * scale rounded to fp16: nothing else is
    lost. Every block repeats the scale of its group. It is d, then m if there is one, then 16 bytes, the i-th with the
    code i in its low half and the code i + 16 in its high half.
    """
    group = codes.shape[1] // scales.shape[1]
    if group % BLOCK:
        raise ValueError(f"groups of {group} weights are not whole blocks of {BLOCK}")
    parameters = [scales]
    if zeros is not None:
        parameters.append((-scales.astype(np.float32) * zeros).astype(np.float16))
    halves = codes.reshape(len(codes), -1, 2, BLOCK // 2)
    parts = [np.repeat(part, group // BLOCK, axis=1)[:, :, None].view(np.uint8) for part in parameters]
    parts.append(halves[:, :, 0] | halves[:, :, 1] << 4)
    return np.concatenate(parts, axis=2).reshape(len(codes), -1)
