"""Search results on disk, in llm-awq's own file (`awq_cache/*.pt`), so that they can be shared both ways.

A dict: "scale" holds tuples of the operation that divides, the linears that are multiplied, and the scale `[channels]`;
"clip" holds tuples of a linear and the largest value of each of its groups, `[out, groups, 1]`, after scaling.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from autoq.errors import CheckpointError
from autoq.quantization.search import SearchResults


def write_awq_cache(path: Path, results: SearchResults) -> None:
    """Writes search results; all of the file or nothing of it."""
    content = {
        "scale": [(prev, linears, scale.cpu()) for (prev, linears), scale in results.scales.items()],
        "clip": [(linear, ranges.cpu()) for linear, ranges in results.clips.items()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(content, file)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def read_awq_cache(path: Path) -> SearchResults:
    """Reads search results. The file is a pickle; only tensors and plain containers are accepted in it.

    Raises CheckpointError for a file that holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as AWQ search results ({reason})") from None
    results = SearchResults()
    try:
        for prev, linears, scale in content["scale"]:
            results.scales[str(prev), tuple(map(str, linears))] = _tensor(scale)
        for linear, ranges in content["clip"]:
            results.clips[str(linear)] = _tensor(ranges)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f'{path} does not hold AWQ search results: a dict with "scale", a list of (operation, linears, tensor), '
            'and "clip", a list of (linear, tensor), was expected'
        ) from None
    return results


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError
    return value
