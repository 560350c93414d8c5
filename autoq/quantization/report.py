"""What a quantization did, linear by linear."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LinearReport:
    """One linear of the model.

    bits, group_size: what it was quantized to; None when it was left as it is.
    error_before, error_after: `|W' X - W X|^2 / |W X|^2` over the calibration tokens, for round-to-nearest and after
        the search; None when it was left as it is.
    tokens: calibration tokens that reached it.
    note: why it was left alone or given another group size; empty otherwise.
    """

    name: str
    bits: int | None
    group_size: int | None
    error_before: float | None
    error_after: float | None
    tokens: int
    note: str = ""


@dataclass
class QuantizationReport:
    """The result of `model.quantize`.

    calibration: one line about the data; tokens: how many there were; seconds: the time of the whole run.
    """

    calibration: str
    tokens: int
    seconds: float = 0.0
    linears: list[LinearReport] = field(default_factory=list)

    @property
    def quantized(self) -> list[LinearReport]:
        return [linear for linear in self.linears if linear.bits is not None]

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
            f"{'linear':48} bits group  error: nearest -> searched  tokens",
        ]
        for entry in self.linears:
            if entry.error_before is None or entry.error_after is None:
                lines.append(f"{entry.name:48} {'-':>4} {'-':>5}  {entry.note}")
                continue
            errors = f"{entry.error_before:>14.3e} -> {entry.error_after:<9.3e}"
            row = f"{entry.name:48} {entry.bits:>4} {entry.group_size:>5} {errors} {entry.tokens:>7,}"
            lines.append(f"{row}  {entry.note}".rstrip())
        return "\n".join(lines)
