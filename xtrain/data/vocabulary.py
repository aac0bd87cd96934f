"""How many symbols the data of a spec has, before any of it is made into tokens."""

from __future__ import annotations

from xtrain.data import sources
from xtrain.data.tokenizers import load_tokenizer
from xtrain.spec.tree import Spec


def data_vocabulary(spec: Spec) -> int:
    """What `open_data(spec).vocab_size` will be. RequestError where data or tokenizer are not there."""
    match spec.data.source:
        case "synthetic":
            return spec.model.vocab_size or sources.BYTE_VOCABULARY
        case "tokens":
            return sources.file_vocabulary(spec)
        case _:
            name, trust = spec.data.tokenizer, spec.model.trust_remote_code
            return load_tokenizer(name, trust_remote_code=trust).vocab_size
