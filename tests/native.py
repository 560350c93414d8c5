"""The native extension and the sets of kernels that this processor runs, for the tests of both."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from autoq import ops


def load_extension() -> ModuleType | None:
    return importlib.import_module("autoq._C") if ops.extension_missing() is None else None


EXTENSION = load_extension()
CAPABILITIES = EXTENSION.cpu_capabilities() if EXTENSION else ["reference"]
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the native extension is not installed")
