"""The families autoq knows: one module of data each, found by being here."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from transformers import PretrainedConfig

from autoq.architectures.base import Architecture, ScaleGroup
from autoq.errors import ArchitectureError

__all__ = ["Architecture", "ScaleGroup", "all_architectures", "architecture_of", "known_model_types"]


@cache
def all_architectures() -> tuple[Architecture, ...]:
    """Every architecture defined by a module of this package."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return tuple(module.ARCHITECTURE for module in modules if hasattr(module, "ARCHITECTURE"))


def known_model_types() -> list[str]:
    """`config.model_type` of every model autoq can quantize."""
    return sorted(name for architecture in all_architectures() for name in architecture.model_types)


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture of a model with this config, or an ArchitectureError that lists the known ones."""
    for architecture in all_architectures():
        if config.model_type in architecture.model_types:
            return architecture
    raise ArchitectureError(
        f"models of type {config.model_type!r} are not supported; supported are {', '.join(known_model_types())}. "
        "A family is added by one file of data in autoq/architectures."
    )
