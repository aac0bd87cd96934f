"""Activations that the transformers library writes out, computed by torch's one kernel for the same formula.

`gelu_new`, GPT-2's own, is eight elementwise operations there: each goes through memory once more, and some
keep a tensor as wide as the inside of a block for the backward pass. F.gelu(approximate="tanh") is the same
function (Hendrycks and Gimpel 2016): its numbers agree to rounding, for less time and fewer activations.
"""

from __future__ import annotations

import importlib

from torch import nn

TANH_FORMS = ("NewGELUActivation", "FastGELUActivation")
"""The library's classes for 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): `gelu_new` and `gelu_fast`."""
NOTE = "model.hf: a GELU that the library writes out is computed by torch's one kernel for the same formula"


def fuse_activations(model: nn.Module) -> bool:
    """Exchange them in place; they have no parameters. Returns whether there were any."""
    library = importlib.import_module("transformers.activations")
    written_out = {getattr(library, name, None) for name in TANH_FORMS}
    found = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) in written_out
    ]
    for module, name in found:
        setattr(module, name, nn.GELU(approximate="tanh"))
    return bool(found)
