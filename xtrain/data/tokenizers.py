"""Text to token ids: bytes, or any Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xtrain.errors import RequestError


class Tokenizer(Protocol):
    identity: str
    """Equal for two tokenizers only when they give the same ids; part of the token cache's key."""
    vocab_size: int
    separator: int
    """The id put between documents."""

    def encode(self, text: str) -> NDArray[np.integer[Any]]:
        """Token ids of `text`, 1-D, without the separator."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 between documents."""

    identity = "bytes"
    vocab_size = 257
    separator = 256

    def encode(self, text: str) -> NDArray[np.integer[Any]]:
        return np.frombuffer(text.encode("utf-8"), np.uint8)


class HuggingFaceTokenizer:
    """A tokenizer of the transformers library; its end-of-text token stands between documents."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise RequestError(
                f"data.tokenizer: {name!r} has no end-of-text token (eos_token) to put between documents; "
                "choose a tokenizer that has one"
            )
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.separator = int(tokenizer.eos_token_id)
        self.identity = f"hf {_digest(tokenizer)} eos {self.separator}"

    def encode(self, text: str) -> NDArray[np.integer[Any]]:
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return np.asarray(encoded["input_ids"], np.int64)

    def save(self, folder: Path) -> None:
        """As the library stores it."""
        self._tokenizer.save_pretrained(folder)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: "bytes", or a Hugging Face name or local folder.

    Raises RequestError when transformers is not installed, or when there is no such tokenizer.
    """
    if name == "bytes":
        return ByteTokenizer()
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as missing:
        raise RequestError(
            f"data.tokenizer: {name!r} is a Hugging Face tokenizer, which needs the transformers library; "
            "`pip install xtrain[hf]`, or use `tokenizer: bytes`"
        ) from missing
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (
        Exception
    ) as error:  # the library raises OSError, ValueError, and errors of its own and of its parts
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"data.tokenizer: {name!r} could not be loaded: {reason}. Expected `bytes`, a folder with "
            "tokenizer files, or the name of a Hugging Face tokenizer that can be fetched or was before"
        ) from error
    return HuggingFaceTokenizer(name, tokenizer)


def _digest(tokenizer: Any) -> str:
    """Hash of all that decides its ids: the whole pipeline of a fast tokenizer, else class and vocabulary."""
    if tokenizer.is_fast:
        pipeline = tokenizer.backend_tokenizer.to_str()
    else:
        version = importlib.import_module("transformers").__version__
        pipeline = json.dumps([type(tokenizer).__name__, version, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(pipeline.encode("utf-8")).hexdigest()
