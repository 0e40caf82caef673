"""Count what each thread's requests used of the device, as `time.thread_time` counts the CPU.

Rounds of training are computed by one thread for several adapters: whoever computes one credits its share to each
request, and the request's own thread adds it to its count.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import torch

from perennial.learner.costs.energy_meter import joules_of


@dataclass(frozen=True)
class DeviceUse:
    """What was used of a device.

    Attributes:
        seconds: Time that the device computed, waiting for the lock on the base included.
        joules: Energy of the whole device in that time; None where it is not measured.
        training_flops: Floating-point operations of training; see `operations`.
        measuring_flops: Floating-point operations of measurements.
    """

    seconds: float = 0.0
    joules: float | None = 0.0
    training_flops: float = 0.0
    measuring_flops: float = 0.0

    def __add__(self, other: DeviceUse) -> DeviceUse:
        """Return the sum; the energy is known only if both are."""
        unknown = self.joules is None or other.joules is None
        return DeviceUse(
            self.seconds + other.seconds,
            None if unknown else (self.joules or 0.0) + (other.joules or 0.0),
            self.training_flops + other.training_flops,
            self.measuring_flops + other.measuring_flops,
        )

    def share(self, share: float, *, training_flops: float = 0.0, measuring_flops: float = 0.0) -> DeviceUse:
        """Return a share of time and energy, 0 to 1, with the operations of the one who has it."""
        joules = None if self.joules is None else self.joules * share
        return DeviceUse(self.seconds * share, joules, training_flops, measuring_flops)


@dataclass(frozen=True)
class Reading:
    """A clock and an energy counter, read at one moment.

    Attributes:
        at_s: Monotonic time in seconds.
        joules: Reading of the energy counter; None where there is none.
    """

    at_s: float
    joules: float | None

    @classmethod
    def now(cls, device: torch.device) -> Reading:
        """Read the clock and the device's energy counter."""
        return cls(time.perf_counter(), joules_of(torch.device(device)))

    def until_now(self, device: torch.device) -> DeviceUse:
        """Return what was used since this reading."""
        now = Reading.now(device)
        used = None if self.joules is None or now.joules is None else now.joules - self.joules
        # A counter that was set back in between tells nothing.
        return DeviceUse(now.at_s - self.at_s, None if used is None or used < 0 else used)


class _Total(threading.local):
    use = DeviceUse()


_total = _Total()


def add_use(use: DeviceUse) -> None:
    """Add to the count of this thread."""
    _total.use += use


def take_use() -> DeviceUse:
    """Return the count of this thread since the last call, and begin at zero."""
    use, _total.use = _total.use, DeviceUse()
    return use
