"""Where the statistics of a run come from: its own calibration samples, or the statistics of an earlier run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from autoq.config import LM_HEAD
from autoq.errors import ConfigError
from autoq.quantization.calibration import CalibrationSet
from autoq.quantization.plan import Plan
from autoq.quantization.ranks import Ranks
from autoq.quantization.statistics import InputStatistics
from autoq.quantization.workspace import StatisticsStore, fingerprint_of_samples


class StatisticsSource:
    """Statistics by the name of a block, or of the head: those of the samples, kept in the store if there is one that
    is not complete; or those of a complete store.

    collects: whether samples have to go through the blocks.
    """

    def __init__(self, plan: Plan, calibration: CalibrationSet, store: StatisticsStore | None, ranks: Ranks) -> None:
        self._calibration, self._store, self._ranks = calibration, store, ranks
        self._fills = store is not None and not store.is_complete
        # Tuning wants the samples themselves.
        self.collects = plan.tunes or store is None or self._fills

    @property
    def description(self) -> str:
        """One line about the data that guides the search."""
        return self._calibration.describe() if self.collects or self._store is None else self._store.description

    def samples(self) -> str:
        """A fingerprint of the samples behind the statistics."""
        if self.collects or self._store is None:
            return fingerprint_of_samples(self._calibration.samples)
        return self._store.samples

    @property
    def tokens(self) -> int:
        """How many of them there are."""
        return self._calibration.tokens if self.collects or self._store is None else self._store.tokens

    def check(self, plan: Plan, done: int, work_dir: Path | None) -> None:
        """Raises ConfigError if the store lacks what this run needs of it.

        done: blocks that were done in `work_dir` before.
        """
        store = self._store
        if store is None:
            return
        if self._fills:
            lacking = [name for name in map(block_key, range(done)) if not store.has(name)]
            if lacking:
                raise ConfigError(
                    f"the run in {work_dir} was begun without statistics={str(store.directory)!r}, which lacks "
                    f"{lacking[0]}; leave statistics out, or begin anew with another work_dir"
                )
        elif not self.collects and _searches_head(plan) and LM_HEAD not in store.names:
            raise ConfigError(
                f"the statistics in {store.directory} were collected without {LM_HEAD}; leave lm_head_bits out, or "
                "give another directory to collect them again"
            )

    def open(self) -> None:
        """Begins to fill the store, if it is to be filled."""
        if self._store is not None and self._fills:
            self._store.begin()

    def gather(self, name: str, statistics: Mapping[str, InputStatistics], owner: int) -> dict[str, InputStatistics]:
        """What all processes collected, by leader, for the one that owns it; the others get nothing."""
        self._ranks.gather(statistics, owner)
        if self._ranks.rank != owner:
            return {}
        if self._store is not None and self._fills:
            for entry in statistics.values():
                entry.finish()
            self._store.save(name, statistics)
        return dict(statistics)

    def stored(self, name: str, device: torch.device) -> dict[str, InputStatistics]:
        """What an earlier run collected, on a device."""
        assert self._store is not None
        return self._store.load(name, device)

    def close(self, plan: Plan, blocks: int) -> None:
        """Declares the store complete, once all is in it."""
        if self._store is not None and self._fills:
            names = [block_key(index) for index in range(blocks)]
            self._store.finish(names + ([LM_HEAD] if _searches_head(plan) else []))


def _searches_head(plan: Plan) -> bool:
    return LM_HEAD in plan.group_sizes and not plan.shares_head


def block_key(index: int) -> str:
    """What statistics of a block are kept under."""
    return f"block-{index:05d}"
