"""What lies in a folder of Hugging Face's form, without torch and without the transformers library."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from xtrain.contract import Problem

CONFIG = "config.json"
SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
OTHER_SAFETENSORS = ("*.safetensors",)
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
"""Reading one of these runs code that is in it."""
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""The form of a model's name: `gpt2`, `EleutherAI/pythia-14m`."""
CONFIG_BYTES = 2**20


def local_folder(hf: str) -> Path | None:
    """The folder that `model.hf` means; None for a name.

    A folder is what is one, or is written like a path, or begins like a path from here.
    """
    path = os.path.expanduser(hf)  # noqa: PTH111 (pathlib raises for what is no possible path)
    like_a_path = hf.startswith((".", "~")) or not NAME.fullmatch(hf)
    parent = os.path.dirname(path)  # noqa: PTH120
    return Path(path) if like_a_path or _is_folder(path) or _is_folder(parent) else None


def has_weights(folder: Path) -> bool:
    return _any(folder, SAFETENSORS) is not None


def folder_problems(folder: Path, key: str = "model.hf") -> Iterator[Problem]:
    """Why no model can be built from `folder`; problems of the spec's `key`."""
    if not _is_folder(str(folder)):
        yield Problem(key, str(folder), "expected a folder that exists", _similar(folder))
    elif not (folder / CONFIG).is_file():
        expected = f"expected a folder with {CONFIG} in it"
        yield Problem(key, str(folder), expected, "name the folder that save_pretrained wrote")
    elif fault := _fault_of_config(folder / CONFIG):
        expected = "expected the config of a model, as save_pretrained writes it"
        yield Problem(key, f"{folder / CONFIG}, which {fault}", expected, "write it again")
    elif not has_weights(folder) and (pickle := _any(folder, PICKLES)):
        expected = "expected weights as safetensors: reading a pickle runs code that is in it"
        yield Problem(key, str(pickle), expected, "save the model again, with a current transformers")
    elif not has_weights(folder) and (other := _any(folder, OTHER_SAFETENSORS)):
        expected = "expected weights in model.safetensors, or in model-00001-of-... with their index"
        yield Problem(key, str(other), expected, "rename it, or move it away to train from the config alone")


def _fault_of_config(path: Path) -> str:
    """What is wrong with it; empty when it says which kind of model it is."""
    try:
        if path.stat().st_size > CONFIG_BYTES:
            return f"is larger than {CONFIG_BYTES:,} bytes"
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        return "is not JSON"
    if not isinstance(config, dict) or not (config.get("model_type") or config.get("auto_map")):
        return "names no model_type"
    return ""


def _is_folder(path: str) -> bool:
    return os.path.isdir(path)  # noqa: PTH112


def _any(folder: Path, patterns: tuple[str, ...]) -> Path | None:
    return next((file for pattern in patterns for file in sorted(folder.glob(pattern))), None)


def _similar(missing: Path) -> str:
    """The folder beside it that looks most like the missing one."""
    try:
        names = [entry.name for entry in missing.parent.iterdir() if entry.is_dir()]
    except (OSError, ValueError):
        names = []
    close = get_close_matches(missing.name, names, n=1)
    return f"did you mean {missing.parent / close[0]}?" if close else f"looked from {Path.cwd()}"
