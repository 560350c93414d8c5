"""All that flows through the blocks of a model while it is quantized."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autoq.nn import QuantEmbedding
from autoq.nn.linear import replaced
from autoq.quantization import tuning
from autoq.quantization.activations import Activations
from autoq.quantization.plan import Plan, name_of_embeddings
from autoq.quantization.search import Probe

# Both models' logits for a held-out batch are in memory at once, and vocabularies are large.
HELD_OUT_BATCH_TOKENS = 1024


class Streams:
    """The samples on their way, each stream at the block it goes through next.

    calibration, probe, held_out: through the blocks as they are. calibration_quantized (only where blocks are tuned)
    and held_out_quantized: through the quantized ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        calibration: Sequence[Tensor],
        probe: Tensor,
        held_out: Sequence[Tensor],
        folder: Path | None,
        resume_at: int,
        embeddings: QuantEmbedding | None = None,
        peers: Sequence[tuple[Sequence[Tensor], Path]] = (),
    ) -> None:
        """folder: where hidden states are kept; None: in memory. resume_at: the first block that is not done.
        embeddings: those that quantized blocks get, if they are quantized too. peers: the calibration samples and the
        folder of every other process, on whose samples blocks are tuned too."""

        def start(samples: Sequence[Tensor], name: str, batch_tokens: int | None = None) -> Activations:
            kept = None if folder is None else folder / name
            return Activations(model, plan, samples, kept, resume_at, batch_tokens)

        self.calibration = start(calibration, "calibration")
        self.probe = start([probe], "probe")
        self.held_out = start(held_out, "held-out", HELD_OUT_BATCH_TOKENS)
        with replaced(model, name_of_embeddings(model), embeddings):
            self.calibration_quantized = start(calibration if plan.tunes else (), "calibration-quantized")
            self.held_out_quantized = start(held_out, "held-out-quantized", HELD_OUT_BATCH_TOKENS)
            self._peers = [
                (
                    Activations(model, plan, samples, place / "calibration-quantized", writes=False),
                    Activations(model, plan, samples, place / "calibration", writes=False),
                )
                for samples, place in peers
            ]
        self._full = (self.calibration, self.probe, self.held_out)
        self._quantized = (self.calibration_quantized, self.held_out_quantized)

    def are_past(self, index: int) -> bool:
        """Whether none has to go through a block as it was any more."""
        return not any(stream.is_at(index) for stream in self._full)

    def through_full(self, index: int, block: nn.Module, home: torch.device) -> None:
        """Sends what is at a block through it, as it was; the block came from `home`, and what it gives goes there."""
        for stream in self._full:
            if stream.is_at(index):
                stream.advance(block, home)

    def through_quantized(self, index: int, block: nn.Module, home: torch.device) -> None:
        """The same, once the block is quantized."""
        for stream in self._quantized:
            if stream.is_at(index):
                stream.advance(block, home)

    def forget(self, index: int) -> None:
        """Deletes the inputs of the blocks before one that a stopped run would not go back to."""
        for stream in (*self._full, *self._quantized):
            stream.states.forget(index)

    def probe_of(self, index: int, device: torch.device) -> Probe | None:
        """What checks the folding of a block; None if it went through already."""
        if not self.probe.is_at(index):
            return None
        return Probe(self.probe.states.read(0).to(device), self.probe.keywords(0, device))

    def tuning_batches(self) -> Sequence[tuning.Batch]:
        """What a block is tuned on, once the full-precision samples of all processes went through it."""
        own = self.calibration_quantized, self.calibration
        for theirs in self._peers:
            for stream, ours in zip(theirs, own, strict=True):
                stream.states.stage = ours.states.stage
        return _TuningBatches([own, *self._peers])


class _TuningBatches(Sequence[tuning.Batch]):
    """A block gets what the quantized blocks before it give, and should give what the full-precision blocks, this one
    among them, gave. Read when they are used."""

    def __init__(self, streams: Sequence[tuple[Activations, Activations]]) -> None:
        """streams: through the quantized blocks and through the full-precision ones, of each process."""
        self._places = [
            (quantized, full, number) for quantized, full in streams for number in range(len(quantized.batches))
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        quantized, full, place = self._places[number]
        inputs = quantized.states.read(place)
        return tuning.Batch(inputs, full.states.read(place), quantized.keywords(place, inputs.device))
