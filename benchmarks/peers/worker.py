"""Processes that do one thing at a time when told to, so that engines alternate while each keeps its own memory.

The driver starts `python -m peers.worker MODULE CLASS`, which makes one object and calls its methods: a request is a
line of JSON with the method and its arguments, a reply is a line with the result or the error. This module needs
nothing but Python, since a worker may run in any environment.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO


class WorkerError(Exception):
    """What a worker could not do, in a line."""


class Worker:
    """The driver's end: `worker.call("decode", steps=16)` runs that method there and waits for what it returns."""

    def __init__(self, python: str, module: str, cls: str) -> None:
        folder = Path(__file__).resolve().parent.parent
        paths = [str(folder), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [python, "-m", "peers.worker", module, cls],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        )
        try:
            self.versions: dict[str, str] = self._reply()
        except WorkerError:
            self.close()
            raise

    def call(self, method: str, **arguments: Any) -> Any:
        """The result of a method; WorkerError if it raised or the process ended."""
        assert self._process.stdin is not None
        try:
            print(json.dumps({"method": method, "arguments": arguments}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise WorkerError("its process has ended") from None
        return self._reply()

    def close(self) -> None:
        """Ends the process, which frees its memory."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise WorkerError(f"its process ended with {signal.Signals(-code).name if code < 0 else f'code {code}'}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["result"]


def peak_memory() -> int:
    """Largest resident memory of this process, in bytes, since it started or `reset_peak_memory`."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> None:
    """Starts the peak anew from what is resident now, where the system can (Linux)."""
    control = Path("/proc/self/clear_refs")
    if control.exists():
        control.write_text("5")


def _serve(module: str, cls: str) -> None:
    # What libraries print must not come between the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        target = getattr(importlib.import_module(f"peers.{module}"), cls)()
    except ImportError as error:
        _send(replies, {"error": f"{getattr(error, 'name', None) or error} is not installed"})
        return
    except Exception as error:
        _send(replies, _failure(error))
        return
    _send(replies, {"result": target.versions()})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": getattr(target, request["method"])(**request["arguments"])}
        except Exception as error:
            reply = _failure(error)
        _send(replies, reply)


def _failure(error: Exception) -> dict[str, Any]:
    traceback.print_exc()
    lines = str(error).strip().splitlines()
    return {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}


def _send(replies: TextIO, reply: dict[str, Any]) -> None:
    print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
