"""Whether torch's `cuda` may work here, as far as that can be seen without torch."""

from __future__ import annotations

from pathlib import Path

DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/nvmap", "/dev/kfd")
"""What there is where it may: NVIDIA's driver, Windows' for Linux, a Jetson's; AMD's."""


def driver_found() -> bool:
    return any(Path(driver).exists() for driver in DRIVERS)
