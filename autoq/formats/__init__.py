"""On-disk formats: one module each, found by being here."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from autoq.errors import ConfigError
from autoq.formats.base import Format, LinearSpec, TensorSpec

__all__ = ["Format", "LinearSpec", "TensorSpec", "all_formats", "get_format"]


@cache
def all_formats() -> dict[str, Format]:
    """Every format defined by a module of this package, by its `version`."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    found: list[Format] = [module.FORMAT for module in modules if hasattr(module, "FORMAT")]
    return {entry.name: entry for entry in found}


def get_format(version: str) -> Format:
    """The format of this `version`, or a ConfigError that lists the known ones."""
    formats = all_formats()
    if version not in formats:
        raise ConfigError(
            f"the checkpoint format (version) {version!r} is not supported; supported are {', '.join(sorted(formats))}"
        )
    return formats[version]
