"""The engines that cpu_peers.py compares, each in a process of its own; see `worker` for how they are driven.

A module imports only what its engine needs, so that each can run in an environment of its own.
"""

from __future__ import annotations
