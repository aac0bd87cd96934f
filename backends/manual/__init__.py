"""The hand-written engine: every technique in plain PyTorch, one small file each.

One process; the entry points differ only in the device. From the training step outwards:

engine.py         the step: accumulate, clip, ask, update; and the rest of xtrain.contract.Engine
  precision.py      two families of mixed precision
  loss_scaling.py   for fp16
  clipping.py       one norm over all gradients, wherever they are
  optimizer.py      AdamW or SGD, decay on matrices only
  in_backward.py    or each weight as soon as its gradient is final
  state.py          weights and moments by name, out of the engine and back
assemble.py       what is decided once, when the engine is put together
  placement.py      layers over devices
  chain.py          whether the blocks of a model are a chain, which that needs
  counts.py         how many blocks each device gets, as the spec says
  split.py          or as many as fit
  estimate.py       what a block needs
  weights.py        fp32 masters, for 16-bit weights and for an optimizer on the CPU
  gradients.py      gradients on the CPU
  activations.py    activations on the CPU
  transfers.py      copies between a device and the CPU
devices.py        what differs between CPUs, NVIDIA's and Apple's GPUs
  drivers.py       whether there may be a GPU for torch's `cuda`, asked without torch
out_of_memory.py  a full device
backend.py        xtrain.contract.Backend: what is honoured, decided, started
  support.py        keys that are refused or have nothing to do
  here.py           devices that this machine has not
  layout.py         where what is kept, for the planner

Recomputation, compilation and the chunked loss work on any engine: xtrain/techniques, xtrain/models/loss.py.
"""

from .backend import ManualBackend

cpu = ManualBackend("cpu")
mps = ManualBackend("mps")
cuda = ManualBackend("cuda")
