"""Speed in the field's terms: floating point operations per second, and what share of the device's that is.

A token costs 6 N + 12 L H T operations, forward and backward: N parameters (tied ones once), L layers of
width H, T tokens in a sequence (Chowdhery et al. 2022, appendix B).
Recomputation is not counted: these are the model's operations, not the machine's.
"""

from __future__ import annotations


def flops_per_token(parameters: int, layers: int, hidden: int, seq_len: int) -> float:
    """With layers or hidden 0, that is unknown, attention's products are left out."""
    return 6.0 * parameters + 12.0 * layers * hidden * seq_len
