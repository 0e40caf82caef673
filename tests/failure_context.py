"""Tell with a failed test how its machine and its brokers were: a limit of time fails for reasons outside the test too."""

from __future__ import annotations

import gc
import os
from pathlib import Path

from perennial.streams.devstack.embedded_kafka.kafka_broker import EmbeddedBroker


def failure_context() -> str:
    """Return, in one line, the load, the memory that is left, and what became of this process's brokers."""
    parts = ["load " + " ".join(f"{load:.1f}" for load in os.getloadavg())]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        parts.append(f"{int(available.split()[1]) // 1024} MiB free")
    # Not isinstance: it asks for `__class__`, and some objects do more than answer.
    parts += [_state(each) for each in gc.get_objects() if issubclass(type(each), EmbeddedBroker)]
    return ", ".join(parts)


def _state(broker: EmbeddedBroker) -> str:
    process = broker._process
    if process is None:
        return "broker stopped"
    status = process.poll()
    return f"broker {broker.bootstrap} " + ("runs" if status is None else f"ended with {status}")
