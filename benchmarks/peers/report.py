"""Markdown, JSON and a plot of what cpu_peers.py found."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from writing import write_results

_Record = dict[str, Any]


def write(results: dict[str, Any], path: Path) -> None:
    """Writes `path` with the endings .md, .json and, where matplotlib is installed, .svg."""
    write_results(path, results, markdown(results))
    if results["decode"] and results["prefill"]:
        _plot(results, path.with_suffix(".svg"))


def markdown(results: dict[str, Any]) -> str:
    parts = [_heading(results)]
    if results["engines"]:
        parts.append(_engines(results["engines"]))
    if results["decode"]:
        parts.append(_decode(results["decode"]))
    if results["prefill"]:
        parts.append(_prefill(results["prefill"]))
    if results["matmul"]:
        parts.append(_matmul(results["matmul"]))
    return "\n\n".join(parts) + "\n"


def _heading(results: dict[str, Any]) -> str:
    about = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"# Engines on a CPU: {results['shape']}'s shape, random weights",
        f"`{results['command']}`",
        f"{about['processor']}, {about['cores']} cores, {(about['memory_bytes'] or 0) / 2**30:.0f} GiB of memory, "
        f"{about['cache_bytes'] / 2**20:.0f} MiB of last-level cache; {', '.join(about['features'])}. {versions}.",
        _bandwidth(results),
        "Times are medians over rounds; in each round every engine takes its turn. `autoq is` says how many times as "
        "fast autoq is, the median of the ratios within a round (with the least and the largest). GB/s are the bytes "
        "of weights and cache that a token reads over its time; `of limit` is their share of the read bandwidth just "
        "before. On a machine shared with others both drift, and what caches hold can exceed the limit.",
    ]
    if results["same_blocks"]:
        found = ", ".join(f"{kind} {value:.5f}" for kind, value in results["same_blocks"].items())
        lines.append(f"Correlation of llama.cpp's logits with ours, from the same blocks and a bf16 head: {found}.")
    lines += [f"Left out: {line}." for line in results["left_out"]]
    return "\n\n".join(line for line in lines if line)


def _bandwidth(results: dict[str, Any]) -> str:
    limits: dict[int, list[float]] = {}
    for record in (*results["decode"], *results["prefill"], *results["matmul"]):
        limits.setdefault(record["threads"], []).extend(record["limit"])
    found = [
        f"{statistics.median(values):.1f} GB/s with {threads} threads (from {min(values):.1f} to {max(values):.1f})"
        for threads, values in limits.items()
        if values
    ]
    size = f"{results.get('probe_bytes', 0) / 2**30:.1f} GiB"
    return f"Read bandwidth, over {size}: {', '.join(found)}." if found else ""


def _engines(engines: dict[str, Any]) -> str:
    rows = [
        [
            name,
            *(_megabytes(about[key]) for key in ("file_bytes", "weight_bytes", "loading_peak_memory")),
            _megabytes(about["peak_memory"]) if "peak_memory" in about else "-",
            f"{about['correlation']:.5f}",
        ]
        for name, about in engines.items()
    ]
    head = ["engine", "file, MB", "read by a token, MB", "peak loading, MB", "peak running, MB", "logits"]
    note = (
        "Peaks are of the whole process, Python and libraries included, and running of all cases below. `logits`: "
        "correlation with those of the model whose weights it was given: quantized with zeros (autoq, Q4_1) or without "
        "(Q4_0), or not quantized; the blocks of Q4_0 and Q4_1 are the same codes and scales, while llama.cpp's "
        "quantizer rounds the head (Q6_K) and the embeddings, as it does in its usual files."
    )
    return f"## Models\n\n{_table(head, rows)}\n\n{note}"


def _decode(records: list[_Record]) -> str:
    cases = [f"{r['threads']} | {r['batch']} | {r['depth']}" for r in records]
    head = ["threads | batch | depth", "engine", "ms", "tokens/s", "GB/s", "of limit", "autoq is"]
    rows = [[case, *_cells(r, records)] for case, r in zip(cases, records, strict=True)]
    return f"## Decode, one step\n\n{_table(head, rows)}"


def _prefill(records: list[_Record]) -> str:
    head = ["threads | prompt", "engine", "ms", "tokens/s", "GB/s", "of limit", "autoq is"]
    rows = [[f"{r['threads']} | {r['prompt']}", *_cells(r, records)] for r in records]
    return f"## Prefill\n\n{_table(head, rows)}"


def _matmul(records: list[_Record]) -> str:
    head = ["threads | in x out | rows", "kernel", "us", "GB/s", "of limit", "autoq is", "error", "with outliers"]
    rows = []
    for record in records:
        case = f"{record['threads']} | {record['shape']} | {record['rows']}"
        microseconds = f"{1000 * statistics.median(record['milliseconds']):.0f}"
        errors = [f"{value:.1e}" for value in record["errors"].values()]
        rows.append([case, record["engine"], microseconds, *_rates(record), _speedup(record, records), *errors])
    note = (
        "Up to 16 rows the weights come from memory: each kernel goes round as many copies as exceed the last-level "
        "cache twice. Errors are against float64 with the same weight, relative in the Frobenius norm, for gaussian "
        "activations and for some with one channel in 64 thirty times as large."
    )
    return f"## One matmul, 4 bits, groups of 128\n\n{_table(head, rows)}\n\n{note}"


def _cells(record: _Record, records: list[_Record]) -> list[str]:
    """Engine, milliseconds, tokens/s, GB/s, share of the limit and autoq's speed beside it."""
    milliseconds = statistics.median(record["milliseconds"])
    return [
        record["engine"],
        f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:.0f}",
        f"{1000 * record['tokens'] / milliseconds:.1f}",
        *_rates(record),
        _speedup(record, records),
    ]


def _rates(record: _Record) -> list[str]:
    """GB/s and their share of the limit."""
    rates = [record["bytes"] / one / 1e6 for one in record["milliseconds"]]
    shares = [rate / limit for rate, limit in zip(rates, record["limit"], strict=False)]
    share = f"{statistics.median(shares):.0%} ({min(shares):.0%}-{max(shares):.0%})" if shares else "-"
    return [f"{statistics.median(rates):.1f}", share]


def _speedup(record: _Record, records: list[_Record]) -> str:
    own = next((r for r in records if r["engine"] == "autoq" and _case(r) == _case(record)), None)
    if own is None or own is record:
        return "-"
    ratios = [peer / ours for peer, ours in zip(record["milliseconds"], own["milliseconds"], strict=True)]
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"


def _case(record: _Record) -> list[Any]:
    return [record.get(key) for key in ("threads", "batch", "depth", "prompt", "shape", "rows")]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; a cell may hold several, divided by bars."""
    lines = [" | ".join(head), *(" | ".join(row) for row in rows)]
    lines.insert(1, "|".join("---" for _ in lines[0].split("|")))
    return "\n".join(f"| {line} |" if i != 1 else f"|{line}|" for i, line in enumerate(lines))


def _plot(results: dict[str, Any], path: Path) -> None:
    """Bars of tokens/s, where matplotlib is installed: decode at batch 1, and prefill, with the most threads."""
    try:
        import matplotlib

        matplotlib.use("svg")
        matplotlib.rcParams["svg.fonttype"] = "none"  # letters, not their outlines
        from matplotlib import pyplot
    except ImportError:
        return
    threads = max((r["threads"] for r in results["decode"]), default=0)
    decode = [r for r in results["decode"] if r["threads"] == threads and r["batch"] == 1]
    prefill = [r for r in results["prefill"] if r["threads"] == threads]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, records, key in ((axes[0], decode, "depth"), (axes[1], prefill, "prompt")):
        places = list(dict.fromkeys(r[key] for r in records))
        names = list(dict.fromkeys(r["engine"] for r in records))
        for i, name in enumerate(names):
            mine = [r for r in records if r["engine"] == name]
            speeds = [1000 * r["tokens"] / statistics.median(r["milliseconds"]) for r in mine]
            spots = [places.index(r[key]) + i / (len(names) + 1) for r in mine]
            axis.bar(spots, speeds, width=1 / (len(names) + 1), label=name, align="edge")
        axis.set_xticks([i + 0.4 for i in range(len(places))], [str(place) for place in places])
        axis.set_ylabel("tokens/s")
    axes[0].set_xlabel("tokens in the cache")
    axes[0].set_title(f"Decode, batch 1, {threads} threads")
    axes[1].set_xlabel("tokens of the prompt")
    axes[1].set_title(f"Prefill, {threads} threads")
    axes[0].legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
