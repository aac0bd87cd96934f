"""The hand-written engine: every technique in plain PyTorch, one small file each.

One process; the entry points differ only in the device.
"""

from .backend import ManualBackend

cpu = ManualBackend("cpu")
mps = ManualBackend("mps")
cuda = ManualBackend("cuda")
