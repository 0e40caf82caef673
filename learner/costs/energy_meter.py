"""Read how much energy a device has used: NVIDIA's NVML for a GPU, Linux's powercap (RAPL) for a CPU.

Both count for the whole device, idle power and other processes included. Where neither can be read, the energy is not
known, and nothing here guesses it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from pathlib import Path
from typing import Final, Protocol

import torch

NVML: Final = "nvml"
RAPL: Final = "rapl"
POWERCAP = Path("/sys/class/powercap")

_log = logging.getLogger("perennial.learner")


class EnergyMeter(Protocol):
    """Counts the energy of one device.

    Attributes:
        source: `nvml` or `rapl`.
    """

    source: str

    def joules(self) -> float:
        """Return the energy since some fixed time, in joules."""
        ...


class NvmlMeter:
    """The energy counter of an NVIDIA GPU (Volta or newer), `nvmlDeviceGetTotalEnergyConsumption`.

    The driver's own library is called: it is there wherever the GPU can be used, so no package is needed.

    Args:
        uuid: The GPU's identity, `GPU-…`: numbers of devices differ between CUDA and NVML.

    Raises:
        OSError: The library, the GPU or its counter is not there.
    """

    source = NVML

    def __init__(self, uuid: str) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._device))
        self.joules()

    def joules(self) -> float:
        """See `EnergyMeter.joules`."""
        millijoules = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise OSError(f"{name} returned {code}")


class RaplMeter:
    """The energy counters of a machine's CPU packages (kernel documentation, "Power Capping Framework").

    A counter that wraps around between two readings is counted on; one that wraps twice is not noticed, which takes
    minutes of full load.

    Args:
        folder: Folder of the power zones.

    Raises:
        OSError: There is no package, or its counter may not be read: since 2020 only root may.
    """

    source = RAPL

    def __init__(self, folder: Path = POWERCAP) -> None:
        self._lock = threading.Lock()
        self._zones = [
            zone for zone in sorted(folder.glob("*-rapl:*"))
            if zone.name.count(":") == 1 and (zone / "name").read_text("ascii").startswith("package")
        ]  # fmt: skip
        if not self._zones:
            raise FileNotFoundError(f"no package in {folder}")
        self._ranges = [int((zone / "max_energy_range_uj").read_text("ascii")) for zone in self._zones]
        self._last = self._readings()
        self._total = 0

    def joules(self) -> float:
        """See `EnergyMeter.joules`."""
        with self._lock:
            now = self._readings()
            for before, after, size in zip(self._last, now, self._ranges, strict=True):
                self._total += after - before + (size if after < before else 0)
            self._last = now
            return self._total / 1e6

    def _readings(self) -> list[int]:
        return [int((zone / "energy_uj").read_text("ascii")) for zone in self._zones]


@functools.cache
def meter_of(device: torch.device) -> EnergyMeter | None:
    """Return what counts the energy of a device; None where nothing can be read."""
    try:
        if device.type == "cuda":
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            return NvmlMeter(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        return RaplMeter()
    except (OSError, AttributeError, ValueError) as error:  # an older torch has no uuid
        _log.info("the energy of %s is not measured: %s", device, error)
        return None


def joules_of(device: torch.device) -> float | None:
    """Return the energy that a device has used since some fixed time, in joules; None where it cannot be read."""
    meter = meter_of(device)
    try:
        return None if meter is None else meter.joules()
    except (OSError, ValueError):  # a counter that fails later must not end an update
        return None
