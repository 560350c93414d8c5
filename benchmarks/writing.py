"""The files that a benchmark leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_results(output: Path, results: Any, text: str) -> None:
    """Writes the results as `output` with the ending .json, and the text about them, Markdown, with the ending .md."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for ending, content in ((".json", json.dumps(results, indent=2)), (".md", text.rstrip("\n"))):
        output.with_suffix(ending).write_text(content + "\n")
