"""The native extension `autoq._C` (csrc/): it registers kernels for the operators, where it is installed."""

from __future__ import annotations

import importlib
import warnings

import torch


def _load() -> str | None:
    """Imports the native extension, which registers its kernels. Returns why it could not be, or None."""
    try:
        importlib.import_module("autoq._C")
    except ModuleNotFoundError:
        return "is not installed"
    except ImportError as error:
        return f"cannot be loaded ({error})"
    return None


_INSTALL = "To build it, run `pip install --no-build-isolation .` where torch and a C++ compiler are installed."
_problem = _load()
_warning: str | None = None


def extension_missing() -> str | None:
    """Why the native extension is not in use, or None when it is."""
    return _problem


def warn_once(device: torch.device) -> None:
    """Says once that the slow path is taken, when an operator first takes it for want of the extension."""
    global _warning
    if _warning is not None:
        return
    if _problem is not None:
        _warning = f"autoq's native extension {_problem}, so its operators run slowly. {_INSTALL}"
    elif device.type == "cuda":
        _warning = f"autoq's native extension was built without CUDA kernels, so it runs slowly. {_INSTALL}"
    else:
        return
    warnings.warn(_warning, RuntimeWarning, stacklevel=3)
