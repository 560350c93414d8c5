"""The errors a user can meet. Each message is a sentence that says what was found, what was wanted and what to do."""

from __future__ import annotations


class AutoQError(Exception):
    """Base of every error autoq raises on purpose."""


class ConfigError(AutoQError, ValueError):
    """A setting that is unknown, contradictory or out of range."""


class ArchitectureError(AutoQError, ValueError):
    """A model whose architecture autoq does not know, or that differs from what its architecture declares."""


class CalibrationError(AutoQError, ValueError):
    """Calibration data that is empty, unreadable or of an unknown kind."""


class QuantizationError(AutoQError, ValueError):
    """A tensor that cannot be quantized, such as one that holds NaN or infinity."""


class CheckpointError(AutoQError, ValueError):
    """A checkpoint that is missing, truncated, inconsistent or unsafe to read."""


class InputError(AutoQError, ValueError):
    """Token ids that a model cannot take, or more of them than it can."""


class OperatorError(AutoQError, ValueError):
    """An operator called with tensors of the wrong shape, dtype or device."""


def first_line(error: Exception) -> str:
    """What an error of another package says, without the pages that may follow."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
