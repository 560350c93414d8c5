"""Search results on disk, in llm-awq's own file (`awq_cache/*.pt`), so that they can be shared both ways.

A dict: "scale" holds tuples of the operation that divides, the linears that are multiplied, and the scale `[channels]`;
"clip" holds tuples of a linear and the largest value of each of its groups, `[out, groups, 1]`, after scaling.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from autoq.config import LM_HEAD
from autoq.errors import CheckpointError, QuantizationError
from autoq.quantization.plan import Plan
from autoq.quantization.search import SearchResults
from autoq.quantization.workspace import write_whole


def write_awq_cache(path: Path, results: SearchResults) -> None:
    """Writes search results; all of the file or nothing of it."""
    content = {
        "scale": [(prev, linears, scale.cpu()) for (prev, linears), scale in results.scales.items()],
        "clip": [(linear, ranges.cpu()) for linear, ranges in results.clips.items()],
    }
    write_whole(path, lambda partial: torch.save(content, partial))


def check_writable(path: Path) -> None:
    """Raises CheckpointError if a file cannot be written there, before anything has been worked out that should be."""
    trial = path.with_name(f".{path.name}.trial")
    write_whole(trial, lambda partial: partial.touch())
    trial.unlink()


def fit_to_model(results: SearchResults, plan: Plan, blocks: int, path: Path) -> SearchResults:
    """The results by the names this plan uses (their linears may be in any order), of the groups it has.

    Raises QuantizationError for a name that the model does not have, or a clip that is none; warns of what is missing.
    """
    known: dict[tuple[str, frozenset[str]], tuple[str, tuple[str, ...]]] = {}
    used = set()
    groups = plan.architecture.groups(plan.model_config, scale_activations=True)
    for prefix in map(plan.block_name, range(blocks)):
        for group in groups:
            names = f"{prefix}.{group.prev}", tuple(f"{prefix}.{leaf}" for leaf in group.linears)
            known[names[0], frozenset(names[1])] = names
            if group in plan.groups:
                used.add(names)
    fitted = SearchResults()
    for (prev, linears), scale in results.scales.items():
        found = known.get((prev, frozenset(linears)))
        if found is None:
            raise QuantizationError(
                f"{path} holds a scale for {prev} and {linears[0] if linears else 'no linear'}, which are no such "
                "group of this model; it is of another model"
            )
        if found not in used:
            raise QuantizationError(
                f"{path} holds a scale for {prev}, which these settings leave unscaled; quantize with "
                "apply_scale=True, and with scale_activations=True if it is an activation"
            )
        fitted.scales[found] = scale
    for linear, ranges in results.clips.items():
        if linear == LM_HEAD and linear not in plan.in_features:
            continue  # the head stays as it is this time
        if linear not in plan.in_features:
            raise QuantizationError(f"{path} holds a clip for {linear}, which this model does not have")
        if not bool((torch.isfinite(ranges) & (ranges >= 0)).all()):
            raise QuantizationError(f"{path} holds a clip for {linear} that is not made of finite, positive numbers")
        spec = plan.specs.get(linear)
        if spec is not None and ranges.shape != (spec.out_features, spec.groups, 1):
            raise QuantizationError(
                f"{path} clips {linear} in ranges of shape {tuple(ranges.shape)}, where groups of {spec.group_size} "
                f"make it {(spec.out_features, spec.groups, 1)}; they were searched for another group size"
            )
        fitted.clips[linear] = ranges
    missing = sorted(prev for prev, _ in used - set(fitted.scales))
    if missing:
        warnings.warn(
            f"{path} has no scale for {len(missing)} groups that could have one ({missing[0]}); they stay unscaled",
            stacklevel=5,
        )
    return fitted


def read_awq_cache(path: Path) -> SearchResults:
    """Reads search results. The file is a pickle; only tensors and plain containers are accepted in it.

    Raises CheckpointError for a file that holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no pickle, or not this kind, ends in more ways than one can list
        reason = f"; {error}" if isinstance(error, OSError) else ""
        raise CheckpointError(
            f"{path} is not a file of AWQ search results, a pickle of tensors and plain containers{reason}"
        ) from None
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
