"""A simulated accelerator, for tests only: stands in for a GPU where there is none.

`sim:0` and `sim:1` are devices of torch like any other, made with its Python PrivateUse1 backend. Their
tensors are ordinary tensors that cannot meet the CPU's without an explicit copy; float64 is refused;
bytes, peaks and copies are counted exactly. tests/simulated/backend.py puts the hand-written engine on it.
"""
