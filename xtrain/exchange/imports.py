"""`xtrain import`: a spec from a config that was written for something else, with all that was decided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from xtrain.errors import RequestError, SpecError
from xtrain.exchange.training_arguments import STEPS, check_arguments, import_arguments, is_training_arguments
from xtrain.exchange.translate import find_translator
from xtrain.exchange.translation import Imported, Translator, Tree
from xtrain.jsonfile import read_json
from xtrain.models.presets import PRESETS
from xtrain.printable import printable
from xtrain.spec.check import check_spec
from xtrain.spec.problems import find_faults, translate
from xtrain.spec.tree import Spec

STAND_INS: dict[str, tuple[Any, str]] = {
    "model.preset": ("gpt2", "a stand-in: the config does not know the model"),
    "data.source": ("stdlib", "a stand-in: the config does not know the data"),
    "train.steps": (STEPS, "a stand-in: the config does not say how long"),
    "schedule.name": ("constant", "the config has no scheduler"),
    "optimizer.lr": (3e-4, "a stand-in: the config has no learning rate"),
}
ORDER = ("model", "data", "batch", "train", "optimizer", "schedule", "precision", "memory")


def import_file(path: Path, arguments_path: Path | None, world: int | None, backend: str | None) -> Imported:
    """The spec for the config at `path`, complete and checked; RequestError says what is wrong in a file."""
    config = read_json(path)
    if not is_training_arguments(config):
        arguments = _read_arguments(arguments_path) if arguments_path is not None else None
        return _from_config(path, config, world, find_translator(backend), arguments)
    if arguments_path is not None:
        raise RequestError(f"{path}: already TrainingArguments; --arguments goes with a config")
    arguments = _read_arguments(path)
    if isinstance(embedded := arguments.get("deepspeed"), dict):
        return _from_config(path, embedded, world, find_translator(backend), arguments)
    found = import_arguments(arguments, world or 1)
    if isinstance(embedded, str) and embedded:
        again = f"deepspeed: {printable(embedded)}: not read; import it with --arguments {path.name}"
        found = replace(found, left_out=[*found.left_out, again])
    return _completed(found, path)


def _read_arguments(path: Path) -> Mapping[str, Any]:
    arguments = read_json(path)
    if problems := check_arguments(arguments):
        raise SpecError(str(path), problems)
    return arguments


def _from_config(
    path: Path,
    config: Mapping[str, Any],
    world: int | None,
    translator: Translator,
    arguments: Mapping[str, Any] | None,
) -> Imported:
    """From a config, and what TrainingArguments beside it say that it does not; asked whether it can run."""
    try:
        found = translator.imported(config, world, arguments)
    except SpecError as error:
        raise SpecError(str(path), error.problems) from error
    if arguments is not None:
        processes = found.spec.get("launch", {}).get("processes", world or 1)
        found = _over(import_arguments(arguments, processes), found)
    whole = _completed(found, path)
    spec = Spec.model_validate(whole.spec)
    return replace(whole, problems=translator.translation_problems(spec, spec.launch.processes))


def _over(base: Imported, upper: Imported) -> Imported:
    """Both; what `upper` says wins. Another schedule or kind of optimizer is not mixed key by key."""
    spec = {**base.spec}
    for name, section in upper.spec.items():
        below = spec.get(name)
        if not isinstance(section, dict) or not isinstance(below, dict) or name == "schedule":
            spec[name] = section
        elif section.get("name", below.get("name")) != below.get("name"):
            spec[name] = {"lr": below["lr"], **section}
        else:
            spec[name] = {**below, **section}
    kept = {key: why for key, why in base.chosen.items() if not _is_said(key, upper.spec)}
    both = {key: f"{upper.chosen[key]}; {kept[key]}" for key in kept.keys() & upper.chosen.keys()}
    return Imported(spec, {**kept, **upper.chosen, **both}, [*base.left_out, *upper.left_out])


def _is_said(key: str, spec: Tree) -> bool:
    section, _, name = key.partition(".")
    return section in spec and (not name or name in spec[section])


def _completed(found: Imported, path: Path) -> Imported:
    """With stand-ins for what the config cannot know, and checked as a spec."""
    spec, chosen = {**found.spec}, dict(found.chosen)
    for key, (value, why) in STAND_INS.items():
        section, _, name = key.partition(".")
        if name not in spec.get(section, {}):
            spec[section] = {**spec.get(section, {}), name: value}
            chosen[key] = why
    groups = spec.get("memory", {}).get("checkpointing", {}).get("number", 0)
    if "model.preset" in chosen and groups > PRESETS["gpt2"].layers:
        spec["model"]["layers"] = groups
        chosen["model.layers"] = f"a stand-in: no model has fewer layers than groups, and here are {groups}"
    if "stand-in" in chosen.get("train.steps", ""):  # that leaves room for the warm-up
        spec["train"]["steps"] = max(spec["train"]["steps"], 2 * spec["schedule"].get("warmup", 0))
    problems = translate(find_faults(spec), spec) or check_spec(Spec.model_validate(spec))
    if problems:
        raise SpecError(f"the spec made from {path}", problems)
    return replace(found, spec=spec, chosen=chosen)


def notes(found: Imported) -> list[str]:
    """What a person should know, a line each."""
    decided = [f"{key}: {why}" for key, why in found.chosen.items()]
    left_out = [f"not carried: {one}" for one in found.left_out]
    refused = [f"cannot run as it is: {problem}" for problem in found.problems]
    return [printable(line) for line in (*decided, *left_out, *refused)]


def as_yaml(found: Imported, path: Path) -> str:
    """A spec file, with the notes as comments at its head."""
    head = [f"# Made by `xtrain import` from {printable(path.name)}. Model and data are to be filled in."]
    head += [f"#   {note}" for note in notes(found)]
    sections = sorted(found.spec, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    body = [line for name in sections for line in _lines({name: found.spec[name]}, 0)]
    return "\n".join([*head, "", *body, ""])


def _lines(tree: Tree, depth: int) -> Iterator[str]:
    for key, value in tree.items():
        indent = "  " * depth
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from _lines(value, depth + 1)
        else:
            yield f"{indent}{key}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def write(text: str, out: Path) -> None:
    """Into a new file; RequestError where there is one already, or none can be."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise RequestError(f"{out} exists; name a new file with --out") from error
    except OSError as error:
        raise RequestError(f"{out} cannot be written: {error.strerror}") from error
