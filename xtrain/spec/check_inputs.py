"""Problems across the keys of `model` and `data`: what is trained, and on what."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from xtrain.contract import Problem
from xtrain.models.hf_folder import folder_problems, local_folder
from xtrain.models.presets import PRESETS, dimensions
from xtrain.spec.keys import printed
from xtrain.spec.nearest import divisors, either, multiples, neighbours
from xtrain.spec.tree import Spec

MODEL_KINDS = ("preset", "factory", "hf")
SOURCES_WITH_FILES = ("text", "tokens")
FACTORY_FORM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def model_problems(spec: Spec) -> Iterator[Problem]:
    yield from _model_kind(spec)
    yield from _model_keys(spec)
    yield from _factory(spec)
    yield from _heads(spec)


def data_problems(spec: Spec) -> Iterator[Problem]:
    yield from _source(spec)
    yield from _data_keys(spec)
    yield from _data_path(spec)


def model_paths(spec: Spec) -> Iterator[Problem]:
    """What is not on this machine; paths are looked for from the current directory."""
    yield from _hugging_face(spec)


def data_paths(spec: Spec) -> Iterator[Problem]:
    """What is not on this machine; paths are looked for from the current directory."""
    if spec.data.source in SOURCES_WITH_FILES:
        for pattern in _patterns(spec):
            yield from _missing_file(pattern)


def fit_problems(spec: Spec) -> Iterator[Problem]:
    """What model and data ask of each other."""
    yield from _context(spec)
    yield from _vocabulary(spec)


def _model_kind(spec: Spec) -> Iterator[Problem]:
    given = [kind for kind in MODEL_KINDS if getattr(spec.model, kind) is not None]
    if len(given) != 1:
        nearest = f"keep {given[0]}" if given else "add preset: gpt2-nano"
        yield Problem("model", " and ".join(given), "expected exactly one of preset, factory, hf", nearest)


def _model_keys(spec: Spec) -> Iterator[Problem]:
    """Keys that mean something only with another kind of model."""
    model = spec.model
    if model.preset is None:
        for key in ("layers", "hidden", "heads", "positions"):
            if (value := getattr(model, key)) is not None:
                nearest = "pass it in model.args" if model.factory else "leave it out"
                yield Problem(f"model.{key}", printed(value), "expected only with model.preset", nearest)
    if model.factory is not None and model.dropout:
        expected = "expected only with model.preset"
        yield Problem("model.dropout", printed(model.dropout), expected, "pass it in model.args")
    if model.trust_remote_code and model.hf is None:
        yield Problem("model.trust_remote_code", "true", "expected only with model.hf", "leave it out")
    if model.args and model.factory is None:
        yield Problem("model.args", printed(model.args), "expected only with model.factory", "leave it out")
    if model.blocks is not None and model.preset is not None:
        expected = "expected only with model.factory or model.hf: a preset's blocks are known"
        yield Problem("model.blocks", model.blocks, expected, "leave it out")


def _factory(spec: Spec) -> Iterator[Problem]:
    factory = spec.model.factory
    if factory is not None and not FACTORY_FORM.fullmatch(factory):
        yield Problem("model.factory", factory, "expected package.module:function", _factory_form(factory))


def _factory_form(factory: str) -> str:
    """`factory` with its separator put right, where that is all it lacks."""
    guess = ":".join(re.sub(r"\.py\b", "", factory).replace("/", ".").replace(":", ".").rsplit(".", 1))
    return f"did you mean {guess}?" if FACTORY_FORM.fullmatch(guess) else "for example my_models.tiny:build"


def _hugging_face(spec: Spec) -> Iterator[Problem]:
    """A name is looked up when the run starts: that needs its library, and perhaps the network."""
    if spec.model.hf is not None and (folder := local_folder(spec.model.hf)) is not None:
        yield from folder_problems(folder)


def _heads(spec: Spec) -> Iterator[Problem]:
    if spec.model.preset is None:
        return
    size = dimensions(spec)
    if size.hidden % size.heads:
        heads = neighbours(size.heads, divisors(size.hidden))
        hidden = neighbours(size.hidden, multiples(size.heads, around=size.hidden))
        expected = f"expected a divisor of hidden ({size.hidden})"
        nearest = f"nearest: heads {either(heads)}, or hidden {either(hidden)}"
        yield Problem("model.heads", str(size.heads), expected, nearest)


def _context(spec: Spec) -> Iterator[Problem]:
    if spec.model.preset is None:
        return
    positions = dimensions(spec).positions
    if spec.data.seq_len > positions:
        expected = f"expected at most model.positions ({positions})"
        nearest = f"use {positions}, or model.positions {spec.data.seq_len}"
        yield Problem("data.seq_len", str(spec.data.seq_len), expected, nearest)


def _vocabulary(spec: Spec) -> Iterator[Problem]:
    given = spec.model.vocab_size
    symbols = PRESETS["gpt2-nano"].vocab_size  # that preset's vocabulary is the bytes'
    from_bytes = spec.data.source in ("stdlib", "text") and spec.data.tokenizer == "bytes"
    if given is not None and from_bytes and given < symbols:
        expected = f"expected at least the {symbols} symbols of data.tokenizer bytes"
        yield Problem("model.vocab_size", str(given), expected, f"use {symbols}, or leave it out")


def weights_paths(spec: Spec) -> Iterator[Problem]:
    """Weights to start from that are not on this machine."""
    given = spec.model.init_from
    if given is not None and not _exists(path := _expanded(given)):
        yield Problem("model.init_from", given, "expected a folder that exists", _nearest_file(path))


def _source(spec: Spec) -> Iterator[Problem]:
    if spec.data.source in ("jsonl", "hf"):
        expected = "not built yet: expected stdlib, text, tokens or synthetic"
        yield Problem("data.source", spec.data.source, expected, "use text, with the texts in files")


def _data_keys(spec: Spec) -> Iterator[Problem]:
    """Keys that mean something only with another source."""
    data = spec.data
    if data.source != "synthetic":
        for key, value in (("masked", data.masked), ("tokens", data.tokens)):
            if value:
                expected = f"expected only with data.source synthetic, not {data.source}"
                yield Problem(f"data.{key}", printed(value), expected, "leave it out")
    if data.source in ("tokens", "synthetic") and data.tokenizer != "bytes":
        expected = f"expected only with a data.source of text: {data.source} has no text to split"
        yield Problem("data.tokenizer", data.tokenizer, expected, "leave it out")


def _data_path(spec: Spec) -> Iterator[Problem]:
    source, path = spec.data.source, spec.data.path
    if source in ("stdlib", "synthetic"):
        if path is not None:
            nearest = "leave it out, or use data.source text"
            yield Problem("data.path", printed(path), f"expected none with data.source {source}", nearest)
    elif source in SOURCES_WITH_FILES and not path:
        expected = f"expected a file, a list of files or a glob: data.source {source} needs one"
        yield Problem("data.path", "", expected, "or use data.source stdlib, which needs none")
    elif source == "tokens":
        yield from _token_file(_patterns(spec))


def _patterns(spec: Spec) -> list[str]:
    path = spec.data.path or []
    return [path] if isinstance(path, str) else path


def _missing_file(pattern: str) -> Iterator[Problem]:
    path = _expanded(pattern)
    if os.path.isdir(path):  # noqa: PTH112
        nearest = f"for example {Path(path, '**', '*.txt')}"
        yield Problem("data.path", pattern, "expected files, not a folder", nearest)
    elif not _exists(path):
        if not glob.has_magic(pattern):
            yield Problem("data.path", pattern, "expected a file that exists", _nearest_file(path))
        elif not any(map(os.path.isfile, glob.iglob(path, recursive=True))):  # noqa: PTH207
            yield Problem("data.path", pattern, "expected a glob that matches a file", _looked_in())


def _token_file(patterns: Sequence[str]) -> Iterator[Problem]:
    if len(patterns) > 1:
        expected = "expected one file with data.source tokens"
        yield Problem("data.path", f"{len(patterns)} files", expected, f"join them, or use {patterns[0]}")
    elif Path(patterns[0]).suffix not in (".npy", ".bin") and not glob.has_magic(patterns[0]):
        expected = "expected .npy, or .bin of little-endian uint16, with data.source tokens"
        yield Problem("data.path", patterns[0], expected, "use data.source text for a file of text")


def _expanded(given: str) -> str:
    """With the home folder for `~`. os.path, because pathlib raises for what is no possible path."""
    return os.path.expanduser(given)  # noqa: PTH111


def _exists(path: str) -> bool:
    return os.path.exists(path)  # noqa: PTH110


def _nearest_file(missing: str) -> str:
    """The name in the same folder that looks most like the missing one."""
    folder, name = Path(missing).parent, Path(missing).name
    try:
        names = [entry.name for entry in folder.iterdir()]
    except (OSError, ValueError):
        return _looked_in()
    close = get_close_matches(name, names, n=1)
    return f"did you mean {folder / close[0]}?" if close else _looked_in()


def _looked_in() -> str:
    return f"looked from {Path.cwd()}"
