"""Rows that a benchmark writes one at a time, and goes on with in another run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from writing import write_results


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which models are measured, and on what data."""
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="model directories")
    parser.add_argument("--calibration", type=Path, required=True, help="JSON list of strings, one sample each")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--window", type=int, default=256, help="tokens of a sample and of a window")
    parser.add_argument("--max-windows", type=int, help="evaluate on the first so many windows only")


def conditions_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a table have in common: the data they were measured on."""
    return {
        "calibration": arguments.calibration.name,
        "text": arguments.text.name,
        "window": arguments.window,
        "max_windows": arguments.max_windows,
    }


def options_of(conditions: dict[str, Any]) -> str:
    """The same as a command's options."""
    given = {name: value for name, value in conditions.items() if value is not None}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())


def kept_rows(output: Path, conditions: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that earlier runs have written; exits if they are of other data."""
    path = output.with_suffix(".json")
    if not path.is_file():
        return []
    kept = json.loads(path.read_text())
    if kept["conditions"] != conditions:
        raise SystemExit(f"{path} holds rows of {kept['conditions']}, not of {conditions}; give another --output")
    rows: list[dict[str, Any]] = kept["rows"]
    return rows


def write_rows(
    output: Path, conditions: dict[str, Any], versions: dict[str, Any], rows: list[dict[str, Any]], lines: list[str]
) -> None:
    """Writes the rows and a text about them."""
    write_results(output, {"conditions": conditions, "versions": versions, "rows": rows}, "\n".join(lines))
