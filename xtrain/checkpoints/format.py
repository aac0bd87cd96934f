"""One checkpoint on disk, format version 2: what it is made of, and how it is read without being trusted.

    checkpoints/step-00000200/
        model-00001-of-00002.safetensors         fp32 weights by parameter name, buffers in their own dtype
        model.safetensors.index.json             which file each is in, as Hugging Face has it
        optimizer-00001-of-00002.safetensors     fp32 moments as <kind>/<parameter name>
        optimizer.safetensors.index.json
        state.json                               step, guards, each rank's extras, data hash, spec, versions
        manifest.json                            size and sha256 of each of these; written last
        config.json                              of a model.hf: tensors then have their library's names

xtrain/checkpoints/writer.py writes it. Nothing in it is a pickle, and nothing in it leads outside its folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError
from pydantic_core import from_json

from xtrain.checkpoints.tensorfile import DTYPES, Shape
from xtrain.contract import StateKind
from xtrain.errors import RequestError
from xtrain.models.hf_folder import CONFIG

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 2
MODEL_INDEX, OPTIMIZER_INDEX = "model.safetensors.index.json", "optimizer.safetensors.index.json"
STATE, MANIFEST = "state.json", "manifest.json"
ALWAYS = (STATE, MODEL_INDEX, OPTIMIZER_INDEX)
"""What every manifest lists; the tensors' files are those of the indexes."""
ADAPTED = "model."
"""What a parameter's name begins with where the model is not ours (xtrain/models/adapter.py). In a checkpoint
with CONFIG it is left out: the names are those of the model's library."""
VERSION_1_WEIGHTS, VERSION_1_MOMENTS = "weights.safetensors", "moments.safetensors"
LARGEST_JSON_BYTES = 64 << 20
_HASHED_AT_ONCE = 4
"""Files; hashing leaves the interpreter free."""
_NAME = re.compile(r"step-(\d{8,12})|\.step-(\d{8,12})\.replaced")

FileName: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$")]
"""Never a path."""
Read = TypeVar("Read", bound=BaseModel)


class CheckpointError(RequestError):
    """A checkpoint that is missing, damaged, or not of this run."""


class Damaged(CheckpointError):
    """A checkpoint whose content is not what was written."""


class _Document(BaseModel):
    """Keys that a later xtrain adds are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class State(_Document):
    """state.json: all that is not a tensor."""

    format_version: int = FORMAT_VERSION
    step: int = Field(ge=0)
    """Updates done; the next one has this 0-based index."""
    backend: str
    world: int = Field(ge=1)
    guards: dict[str, JsonValue] | None
    extras: list[dict[str, JsonValue]] = Field(min_length=1)
    """Engine.extras of each rank."""
    data_hash: str
    model_hash: str | None = None
    """Of the config of a model that another library builds: its name says only where that was."""
    best: tuple[int, float] | None = None
    """Step and eval_loss of the best checkpoint so far, where checkpoint.best asked for it."""
    spec: dict[str, JsonValue]
    versions: dict[str, JsonValue]


class FileFacts(_Document):
    """What the manifest says of one file."""

    bytes: int = Field(ge=0)
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")] | None
    """None in format version 1, which has no hashes."""


class Manifest(_Document):
    """manifest.json; a last key `sha256` is the hash of the rest as it is written here."""

    format_version: int
    step: int
    files: dict[FileName, FileFacts]


class Index(_Document):
    """Which file a tensor is in, by key."""

    metadata: dict[str, JsonValue] = {}
    weight_map: dict[str, FileName]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder. What is read from it is checked first; Damaged names the file that is wrong."""

    path: Path
    step: int

    @cached_property
    def manifest(self) -> Manifest:
        file = self.path / MANIFEST
        if not file.exists() and (self.path / VERSION_1_WEIGHTS).exists():
            return _version_1(self)
        data = _content(file)
        try:
            content = from_json(data)
        except ValueError as error:
            raise Damaged(f"{file} is damaged: {error}") from None
        if not isinstance(content, dict) or data != manifest_bytes(content):
            raise Damaged(f"{file} is damaged: its own hash does not fit")
        if content.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{file} has format version {content.get('format_version')}; this xtrain reads 1 and "
                f"{FORMAT_VERSION}: use the xtrain that wrote it, or a newer one"
            )
        manifest = _checked(file, Manifest, data)
        if missing := [name for name in ALWAYS if name not in manifest.files]:
            raise Damaged(f"{file} is damaged: it does not list {', '.join(missing)}")
        return manifest

    def state(self) -> State:
        """The checked state.json."""
        file = self.path / STATE
        state = _checked(file, State, _content(file))
        if state.step != self.step:
            raise Damaged(f"{file} says step {state.step}, its folder step {self.step}")
        return state

    def check(self, hashes: bool) -> None:
        """Raise Damaged unless all is there, whole and well-formed. Needs no torch.

        With `hashes` every byte is read; without, headers and sizes.
        """
        if found := list(self.damage(hashes)):
            raise Damaged("; ".join(found))
        self.state()
        self.reader("np").check_files()

    def damage(self, hashes: bool) -> Iterator[str]:
        """What is wrong with its files, a sentence for each; Damaged when the manifest itself is."""
        files = self.manifest.files
        wrong = {name: _size_wrong(self.path / name, facts) for name, facts in files.items()}
        if hashes:
            with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
                whole = [name for name in files if not wrong[name] and files[name].sha256]
                for name, found in zip(whole, pool.map(self._hash, whole), strict=True):
                    wrong[name] = "" if found == files[name].sha256 else "its hash does not fit"
        if self.manifest.step != self.step:
            yield f"{self.path / MANIFEST} says step {self.manifest.step}, its folder step {self.step}"
        yield from (f"{self.path / name} is damaged: {reason}" for name, reason in wrong.items() if reason)

    def _hash(self, name: str) -> str:
        try:
            return sha256(self.path / name)
        except OSError as error:
            raise _unreadable(self.path / name, error) from error

    def reader(self, framework: str = "pt") -> Reader:
        return Reader(self, framework)


class Reader:
    """The contract's StateReader over a checkpoint's files, opened when asked for and never read whole."""

    def __init__(self, checkpoint: Checkpoint, framework: str) -> None:
        self._checkpoint = checkpoint
        self._framework = framework
        self._files: dict[str, Any] = {}

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        key = self._key_of(name, kind)
        place = self._index(kind).get(key)
        if place is None:
            return None
        dtype = self._slice(place, key).get_dtype()
        if dtype not in DTYPES.values() or (dtype != "F32" and kind != "buffer"):
            raise Damaged(f"{self._checkpoint.path / place}: {key} has dtype {dtype}, expected F32")
        return self._files[place].get_tensor(key)  # type: ignore[no-any-return]

    def keys(self, kind: StateKind) -> list[str]:
        """Of the file family that `kind` is in: our names, or <kind>/<name>."""
        if kind in ("weight", "buffer"):
            return [f"{self._wrapper}{key}" for key in self._weights]
        found = (key.partition("/") for key in self._moments)
        return [f"{moment}/{self._wrapper}{name}" for moment, _, name in found]

    def shape(self, name: str, kind: StateKind) -> Shape | None:
        """Without reading the tensor; None when there is none."""
        key = self._key_of(name, kind)
        place = self._index(kind).get(key)
        return None if place is None else tuple(self._slice(place, key).get_shape())

    def dtype(self, name: str, kind: StateKind) -> str:
        """As the format names it, of a tensor that is there."""
        key = self._key_of(name, kind)
        return str(self._slice(self._index(kind)[key], key).get_dtype())

    def check_files(self) -> None:
        """Raise Damaged unless every tensor of the indexes is where they say."""
        for index in (self._weights, self._moments):
            for key, place in index.items():
                self._slice(place, key)

    @cached_property
    def _wrapper(self) -> str:
        return wrapper_of(self._checkpoint.manifest.files)

    def _key_of(self, name: str, kind: StateKind) -> str:
        return key_of(name.removeprefix(self._wrapper), kind)

    def _index(self, kind: StateKind) -> Mapping[str, str]:
        return self._weights if kind in ("weight", "buffer") else self._moments

    @cached_property
    def _weights(self) -> Mapping[str, str]:
        return self._read_index(MODEL_INDEX, VERSION_1_WEIGHTS)

    @cached_property
    def _moments(self) -> Mapping[str, str]:
        return self._read_index(OPTIMIZER_INDEX, VERSION_1_MOMENTS)

    def _read_index(self, name: str, version_1: str) -> Mapping[str, str]:
        checkpoint = self._checkpoint
        if checkpoint.manifest.format_version == 1:
            return dict.fromkeys(self._open(version_1).keys(), version_1)
        file = checkpoint.path / name
        index = _checked(file, Index, _content(file)).weight_map
        if strangers := sorted(set(index.values()) - set(checkpoint.manifest.files)):
            raise Damaged(f"{file} is damaged: {MANIFEST} has no {strangers[0]}")
        return index

    def _slice(self, place: str, key: str) -> Any:
        from safetensors import SafetensorError

        try:
            return self._open(place).get_slice(key)
        except SafetensorError as error:
            raise Damaged(f"{self._checkpoint.path / place} is damaged: {error}") from None

    def _open(self, place: str) -> Any:
        """The file, its header read and held against its size."""
        from safetensors import SafetensorError, safe_open

        if place not in self._files:
            file = self._checkpoint.path / place
            try:
                self._files[place] = safe_open(file, framework=self._framework)
            except SafetensorError as error:
                raise Damaged(f"{file} is damaged: {error}") from error
            except OSError as error:
                raise _unreadable(file, error) from error
        return self._files[place]


def wrapper_of(files: Collection[str]) -> str:
    """What the names of tensors have in front here, and not in a checkpoint that has these files."""
    return ADAPTED if CONFIG in files else ""


def key_of(name: str, kind: StateKind) -> str:
    """The key of a tensor in its file."""
    return name if kind in ("weight", "buffer") else f"{kind}/{name}"


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name is meant as one: `step-lr` may well be a run."""
    return re.fullmatch(r"step-\d+", name) is not None


def replaced_name(step: int) -> str:
    """Of a checkpoint that makes room for a new one of the same step."""
    return f".{folder_name(step)}.replaced"


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """Every checkpoint below `folder` that was finished, by step number, oldest first; unread.

    One that made room is among them where its writer died before the new one had its name.
    """
    if not folder.is_dir():
        return []
    found = ((path, _NAME.fullmatch(path.name)) for path in folder.iterdir() if path.is_dir())
    by_step: dict[int, Path] = {}
    for path, match in found:
        if match is None:
            continue
        step = int(match[1] or match[2])
        if match[1] or step not in by_step:
            by_step[step] = path
    return [Checkpoint(path, step) for step, path in sorted(by_step.items())]


def manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """manifest.json with its own hash; any `sha256` in `content` is replaced."""
    body = {key: value for key, value in content.items() if key != "sha256"}
    own = hashlib.sha256(json.dumps(body, indent=2).encode()).hexdigest()
    return (json.dumps({**body, "sha256": own}, indent=2) + "\n").encode()


def sha256(file: Path) -> str:
    """Of its content; raises OSError."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _version_1(checkpoint: Checkpoint) -> Manifest:
    """What the first format would have said, had it had a manifest."""
    names = (VERSION_1_WEIGHTS, VERSION_1_MOMENTS, STATE)
    sizes = {name: file.stat().st_size for name in names if (file := checkpoint.path / name).is_file()}
    files = {name: FileFacts(bytes=sizes.get(name, 0), sha256=None) for name in names}
    return Manifest(format_version=1, step=checkpoint.step, files=files)


def _size_wrong(file: Path, facts: FileFacts) -> str:
    if file.is_symlink() or not file.is_file():
        return "it is missing" if not file.exists() else "expected a file"
    found = file.stat().st_size
    return "" if found == facts.bytes else f"found {found} bytes, expected {facts.bytes}"


def _content(file: Path) -> bytes:
    try:
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise Damaged(f"{file} is a link or a device; expected a file")
        with file.open("rb") as opened:
            # Memory is taken for what is asked: of a file of 2 KiB not the largest one allowed.
            size = os.fstat(opened.fileno()).st_size
            content = opened.read(min(size, LARGEST_JSON_BYTES) + 1)
    except OSError as error:
        raise _unreadable(file, error) from error
    if len(content) > LARGEST_JSON_BYTES:
        raise Damaged(f"{file} is too large: {size} bytes, at most {LARGEST_JSON_BYTES} are read")
    return content


def _unreadable(file: Path, error: OSError) -> CheckpointError:
    """What may not be read is not damaged: it is not to be put aside for that."""
    kind = CheckpointError if isinstance(error, PermissionError) else Damaged
    return kind(f"cannot read {file}: {error.strerror or error}")


def _checked(file: Path, document: type[Read], data: bytes) -> Read:
    try:
        return document.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise Damaged(f"{file} is damaged: {where}{first['msg']}") from None
