"""How many tokens a model takes, and what is wrong with its token ids.

That is found out once torch has stumbled over them: to look at every step's would have a GPU wait for each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from autoq.errors import InputError

# Where the configurations of the families keep the longest sequence the model takes.
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")


def context_length(config: Any) -> int | None:
    """The longest sequence a model takes, in tokens, or None where its configuration names no limit (Bloom)."""
    for name in _CONTEXT_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


@contextmanager
def explained(config: Any, ids: Any, more: Callable[[], int], where: str) -> Iterator[None]:
    """Raises InputError in the place of torch's error, if token ids or their number explain it.

    ids: what was given as input_ids. more: how many tokens there are besides; `where`, for the sentence.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        fault = None
        if isinstance(ids, Tensor):
            fault = _fault_of_kind(ids)
            # Not what else can go wrong with many tokens, such as too little memory.
            if fault is None and re.search(r"\b(index|indices)\b", str(error)):
                fault = _fault_of_values(config, ids, more(), where)
        if fault is None:
            raise
        raise InputError(fault) from error


def _fault_of_kind(ids: Tensor) -> str | None:
    if ids.numel() == 0:
        return (
            f"input_ids is {list(ids.shape)}: there is no token; give at least one, such as the tokenizer's bos_token"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        return f"input_ids has the dtype {ids.dtype}; token ids are torch.int64"
    return None


def _fault_of_values(config: Any, ids: Tensor, more: int, where: str) -> str | None:
    size = config.get_text_config().vocab_size
    wrong = ((ids < 0) | (ids >= size)).nonzero()
    if len(wrong):
        place = wrong[0].tolist()
        return (
            f"input_ids{place} is {ids[tuple(place)].item()}, but the model's vocabulary has {size} tokens, counted "
            "from 0; use the tokenizer that came with the model"
        )
    context = context_length(config)
    if context is None or ids.shape[-1] + more <= context:
        return None
    return (
        f"the model's context is {context} tokens, but input_ids holds {ids.shape[-1]} and {more} more are {where}; "
        "use fewer"
    )
