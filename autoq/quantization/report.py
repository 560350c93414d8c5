"""What a quantization did, linear by linear."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from autoq.errors import QuantizationError


@dataclass(frozen=True)
class LinearReport:
    """One linear of the model, or its embeddings.

    bits, group_size: what it was quantized to; None when it was left as it is.
    error_before, error_after: `|W' X - W X|^2 / |W X|^2` over the calibration tokens, for round-to-nearest and after
        the search, on at most 2,048 rows of the weight; None when it was left as it is. Of embeddings, whose rows are
        looked up: `|W' - W|^2 / |W|^2`.
    tokens: calibration tokens that reached it.
    note: why it was left alone or given another group size; empty otherwise.
    clipped: share of the weights that the clip search cut; None when it was left as it is, and of embeddings.
    """

    name: str
    bits: int | None
    group_size: int | None
    error_before: float | None
    error_after: float | None
    tokens: int
    note: str = ""
    clipped: float | None = None


def size_note(group_size: int | None, wanted: int) -> str:
    """What the report notes of a group size beside the one asked for."""
    return "" if group_size == wanted else f"group size {wanted} does not divide its inputs"


@dataclass(frozen=True)
class HeldOutReport:
    """The quantized model beside the full-precision one on text that took no part in the calibration.

    source: where the text came from; tokens: how many.
    perplexity_before, perplexity_after: of the full-precision model and of the quantized one, over the tokens but the
        first of each sample. A sample is as long as a calibration sample, so they compare with each other only.
    kl_divergence: mean KL(full precision || quantized) in nats over all positions.
    top1_agreement: share of the positions, 0 to 1, where both find the same token the most likely.
    """

    source: str
    tokens: int
    perplexity_before: float
    perplexity_after: float
    kl_divergence: float
    top1_agreement: float

    def __str__(self) -> str:
        return (
            f"held-out text ({self.tokens:,} tokens from {self.source}): perplexity {self.perplexity_before:.4g} -> "
            f"{self.perplexity_after:.4g}, KL divergence {self.kl_divergence:.3g}, "
            f"same first choice {self.top1_agreement:.1%}"
        )


@dataclass
class QuantizationReport:
    """The result of `model.quantize`.

    calibration: one line about the data; tokens: how many there were; seconds: the time of the whole run (of the last
        part of it, if it was stopped and resumed); seconds_by_part: of this process, on measuring how much each linear
        matters, the embeddings, reading blocks, observing what their linears read, searching and rounding, sending
        samples through the quantized blocks, waiting for these to be written, the head, and judging the result. On
        several devices searches overlap.
    embeddings: their line, apart from those of the linears: their errors do not compare.
    held_out: the model's quality on other text; None where there was none.
    max_kl: the KL divergence there beyond which the model is not to be saved; None: any is fine.
    """

    calibration: str
    tokens: int
    seconds: float = 0.0
    linears: list[LinearReport] = field(default_factory=list)
    held_out: HeldOutReport | None = None
    max_kl: float | None = None
    embeddings: LinearReport | None = None
    seconds_by_part: dict[str, float] = field(default_factory=dict)

    def check_quality(self) -> None:
        """Raises QuantizationError if the KL divergence on held-out text is beyond `max_kl`."""
        if self.max_kl is None or self.held_out is None or self.held_out.kl_divergence <= self.max_kl:
            return
        worst = ", ".join(f"{linear.name} ({linear.error_after:.1%})" for linear in self.worst[:3])
        raise QuantizationError(
            f"the quantized model's KL divergence from the full-precision one is {self.held_out.kl_divergence:.3g} on "
            f"held-out text, beyond max_kl={self.max_kl:g}; the linears with the largest output errors are {worst}. "
            "Use more bits, a smaller group size or calibration data closer to that text, or save it as it is with "
            "save_quantized(..., ignore_max_kl=True)"
        )

    @property
    def quantized(self) -> list[LinearReport]:
        return [linear for linear in self.linears if linear.bits is not None]

    @property
    def worst(self) -> list[LinearReport]:
        """The quantized linears whose error was measured, those with the largest first."""
        measured = [linear for linear in self.quantized if linear.error_after is not None]
        return sorted(measured, key=lambda linear: -(linear.error_after or 0.0))

    @property
    def skipped(self) -> list[LinearReport]:
        return [linear for linear in self.linears if linear.bits is None]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{len(self.quantized)} linears quantized in {self.seconds:.0f} s, {len(self.skipped)} left as they are",
            self.calibration,
            str(self.held_out or "not judged: no text was held out; eval_data takes some"),
            f"{'linear':48} bits group  error: nearest -> searched  tokens",
        ]
        for entry in self.linears if self.embeddings is None else [self.embeddings, *self.linears]:
            if entry.error_before is None or entry.error_after is None:
                lines.append(f"{entry.name:48} {entry.bits or '-':>4} {entry.group_size or '-':>5}  {entry.note}")
                continue
            errors = f"{entry.error_before:>14.3e} -> {entry.error_after:<9.3e}"
            row = f"{entry.name:48} {entry.bits:>4} {entry.group_size:>5} {errors} {entry.tokens:>7,}"
            lines.append(f"{row}  {entry.note}".rstrip())
        return "\n".join(lines)
