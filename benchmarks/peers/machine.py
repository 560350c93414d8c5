"""What the figures were measured on (Linux tells; elsewhere some of it is missing)."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")


def describe() -> dict[str, Any]:
    """Processor, features that matter to matmuls, cores, last-level cache and memory."""
    fields = _fields(Path("/proc/cpuinfo"))
    flags = fields.get("flags", "").split()
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "features": [name for name in _FEATURES if name in flags],
        "cores": os.cpu_count(),
        "cache_bytes": last_level_cache(),
        "memory_bytes": _memory("MemTotal"),
        "system": platform.system(),
    }


def last_level_cache() -> int:
    """Bytes of the largest cache; 0 if it is not known."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes), default=0)


def available_memory() -> int | None:
    """Bytes that new processes can use, or None if that is not known."""
    return _memory("MemAvailable")


def _memory(name: str) -> int | None:
    value = _fields(Path("/proc/meminfo")).get(name)
    return None if value is None else int(value.split()[0]) * 1024


def _fields(path: Path) -> dict[str, str]:
    """The `name: value` lines of a file, the first of each name; none where there is no such file."""
    fields: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields
