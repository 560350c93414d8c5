"""A run: its workers, the rounds in which they take turns, and its results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from peers import machine, report
from peers.worker import Worker, WorkerError

# The fewest bytes the probe reads, and how many times it exceeds the last-level cache.
_LEAST_PROBE, _PROBE_CACHES = 2**30, 4


class Bench:
    """`results` is what is written: `save` does it, after every part of the run."""

    def __init__(self, arguments: argparse.Namespace, command: str) -> None:
        self.arguments = arguments
        self.results: dict[str, Any] = {
            "command": command,
            "shape": arguments.shape,
            "machine": machine.describe(),
            "versions": {},
            "left_out": [],
            "same_blocks": {},
            "engines": {},
            "decode": [],
            "prefill": [],
            "matmul": [],
        }
        self._workers: list[Worker] = []
        self._probe = self._start_probe()

    def start(self, name: str, package: str, module: str, cls: str) -> Worker | None:
        """A worker of a package (see --python), or None if what it needs is not there."""
        try:
            worker = Worker(self.arguments.python.get(package, sys.executable), module, cls)
        except WorkerError as error:
            self.leave_out(name, error)
            return None
        self._workers.append(worker)
        self.results["versions"] |= worker.versions
        return worker

    def prepare(self) -> Worker | None:
        """A worker that writes what the others load, or None if it cannot run; to be ended, as it needs much memory."""
        return self.start("all engines", "autoq", "prepare", "Prepare")

    def end(self, worker: Worker) -> None:
        self._workers.remove(worker)
        worker.close()

    def close(self) -> None:
        for worker in list(self._workers):
            self.end(worker)

    def leave_out(self, name: str, reason: object) -> None:
        self.results["left_out"].append(f"{name}: {reason}")
        say(f"left out: {name}: {reason}")

    def save(self) -> None:
        if self.arguments.output is not None:
            report.write(self.results, self.arguments.output)

    def each(self, peers: dict[str, Worker], method: str, **arguments: Any) -> None:
        """Calls a method of every worker; one that fails is left out from then on."""
        for name, worker in list(peers.items()):
            try:
                worker.call(method, **arguments)
            except WorkerError as error:
                self.leave_out(name, error)
                del peers[name]

    def rounds(
        self, peers: dict[str, Any], threads: int, rounds: int, measure: Callable[[str], float]
    ) -> dict[str, dict[str, list[float]]]:
        """What each measured in every round ("milliseconds"), and the probe's GB/s just before ("limit"); each round
        starts with another.

        peers: by name; one that fails is left out from then on.
        """
        order = list(peers)
        found: dict[str, dict[str, list[float]]] = {name: {"milliseconds": [], "limit": []} for name in order}
        for i in range(rounds):
            start = i % max(len(order), 1)
            for name in order[start:] + order[:start]:
                if name not in peers:
                    continue
                if self._probe is not None:
                    found[name]["limit"].append(self._probe.call("measure", threads=threads))
                try:
                    found[name]["milliseconds"].append(measure(name))
                except WorkerError as error:
                    self.leave_out(name, error)
                    del peers[name]
        return {name: found[name] for name in peers}

    def _start_probe(self) -> Worker | None:
        size = max(_LEAST_PROBE, _PROBE_CACHES * machine.last_level_cache())
        probe = self.start("the probe of the read bandwidth", "autoq", "bandwidth", "Bandwidth")
        if probe is not None:
            probe.call("load", size=size)
            self.results["probe_bytes"] = size
        return probe


def say(text: str) -> None:
    """Tells how far the run is."""
    print(text, file=sys.stderr, flush=True)
