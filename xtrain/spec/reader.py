"""YAML text to plain data, with the place of every key and value.

Stricter than YAML: one document, words as keys, no tags, no key twice, numbers finite, sizes capped.
Numbers and booleans are YAML 1.2's, so `3e-4` is a number and `no` is a word.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from xtrain.contract import JSON, Problem

MAX_BYTES = 1 << 20
MAX_NODES = 10_000
"""Keys and values of a document, each alias counted as often as it is used."""
MAX_DEPTH = 50

TAG = "tag:yaml.org,2002:"
WORDS = {"null": None, "~": None, "": None, "true": True, "false": False}
NULL = re.compile(r"~|null|Null|NULL|")
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,30}(_[0-9]{1,30}){0,10})")
NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""NUL and lone surrogates can be written in YAML as escapes, but no path and no UTF-8 has them."""
FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*(_[0-9]+)*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)


class Mark(NamedTuple):
    """A place in a text, counted from 1."""

    line: int
    column: int


@dataclass
class Document:
    """What a YAML text says, and where it says it; places are by dotted path."""

    data: Any = None
    """None, bool, int, float, str, and lists and dicts of them."""
    keys: dict[str, Mark] = field(default_factory=dict)
    values: dict[str, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    """Faults that leave the rest readable: keys given twice, numbers that are none."""


class Unreadable(Exception):
    """The text cannot be read at all; says why as a Problem."""

    def __init__(
        self, expected: str, *, nearest: str = "", mark: Mark | None = None, found: str = ""
    ) -> None:
        line, column = mark or (None, None)
        self.problem = Problem("", found, expected, nearest, line, column)
        super().__init__(str(self.problem))


def read_file(path: Path) -> Document:
    """Read a spec file; Unreadable as of its text."""
    return read_document(read_text(path))


def read_document(text: str) -> Document:
    """Read a spec, whose top level is a mapping; Unreadable where there is none."""
    document = parse(text)
    if document.data is None:
        raise Unreadable("the file is empty", nearest="start from one of configs/")
    if not isinstance(document.data, dict):
        raise Unreadable(
            "expected keys such as `model:` at the top level",
            found="a list" if isinstance(document.data, list) else repr(document.data)[:60],
            mark=document.values[""],
        )
    return document


def parse(text: str) -> Document:
    """Read one YAML document; Unreadable when it is not YAML, or more than plain YAML."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        raise Unreadable(
            f"a character that no text has, at position {error.position + 1}",
            nearest="save the file as UTF-8 text",
        ) from error
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error) from error
    return _Builder().build(node)


def as_scalar(text: str) -> JSON:
    """What `text` would be without quotes: a number, true, false, null, or itself."""
    try:
        document = parse(text)
    except Unreadable:
        return text
    return text if document.problems or isinstance(document.data, dict | list) else document.data


def read_text(path: Path) -> str:
    """The file's text; Unreadable where it is no file, too large, or not UTF-8."""
    if os.path.isdir(path):  # noqa: PTH112 - pathlib raises for what is no possible path
        raise Unreadable("a folder, not a file", nearest="name a YAML file in it")
    if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113
        raise Unreadable("a pipe or device, not a file", nearest="save it as a file: it is read again later")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise Unreadable("no such file", nearest=_neighbours(path)) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Unreadable(f"cannot be read: {reason}") from error
    if len(content) > MAX_BYTES:
        raise Unreadable("larger than 1 MiB, which no spec is", nearest="is this the right file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"byte {error.start + 1} is not UTF-8", nearest="save the file as UTF-8 text"
        ) from error


def _neighbours(path: Path) -> str:
    """A file of a similar name, for a path that was mistyped."""
    from difflib import get_close_matches

    try:
        names = [other.name for other in path.parent.glob("*.y*ml") if other.exists()]
    except OSError:
        return ""
    return (
        f"did you mean {path.parent / near[0]}?"
        if (near := get_close_matches(path.name, names, 1, 0.75))
        else ""
    )


def _mark(mark: yaml.Mark | None) -> Mark | None:
    return Mark(mark.line + 1, mark.column + 1) if mark is not None else None


def _syntax_error(error: yaml.MarkedYAMLError) -> Unreadable:
    mark, problem = _mark(error.problem_mark), str(error.problem or error.context)
    if "'\\t'" in problem:
        return Unreadable("a tab, where YAML allows only spaces", nearest="indent with spaces", mark=mark)
    if "another document" in problem:
        return Unreadable(
            "a second document starts here", nearest="keep one spec in a file, without `---` lines", mark=mark
        )
    context = f" {error.context}" if error.context and error.context != problem else ""
    return Unreadable(f"not valid YAML{context}: {problem}", mark=mark)


class _Loader(yaml.SafeLoader):
    """Composes nodes, with YAML 1.2's words for numbers and booleans; too much is refused on the way."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (PyYAML's name; filled below)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.nodes = self.depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.nodes += 1
        self.depth += 1
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if self.nodes > MAX_NODES:
            raise Unreadable(f"more than {MAX_NODES:,} keys and values", mark=_mark(event.start_mark))
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"nested more than {MAX_DEPTH} deep", mark=_mark(event.start_mark))
        try:
            node = super().compose_node(parent, index)
        finally:
            self.depth -= 1
        if node is not None and (tag := getattr(event, "tag", None)):
            node.tag = tag.replace(TAG, "!!")  # in this form no tag that was written passes for a plain one
        return node


def _add_resolver(name: str, pattern: re.Pattern[str], first: Sequence[str] | None) -> None:
    _Loader.add_implicit_resolver(TAG + name, re.compile(rf"(?:{pattern.pattern})\Z"), first)


_add_resolver("null", NULL, ["~", "n", "N", ""])
_add_resolver("bool", BOOL, list("tTfF"))
_add_resolver("int", INT, list("-+0123456789"))
_add_resolver("float", FLOAT, list("-+0123456789."))


class _Builder:
    """Turns nodes into data, and notes where everything stands."""

    def __init__(self) -> None:
        self.document = Document()
        self.nodes = 0

    def build(self, node: Node | None) -> Document:
        if node is not None:
            self.document.data = self._value(node, "", ())
        return self.document

    def _value(self, node: Node, path: str, above: tuple[Node, ...]) -> Any:
        """`above` are the nodes that this one is in, outermost first."""
        mark = Mark(node.start_mark.line + 1, node.start_mark.column + 1)
        self.nodes += 1
        if any(node is one for one in above):
            raise Unreadable("this value refers to itself", nearest="write it out", mark=mark)
        if self.nodes > MAX_NODES:
            raise Unreadable(
                f"aliases expand to more than {MAX_NODES:,} values", nearest="write the values out", mark=mark
            )
        if len(above) > MAX_DEPTH:
            raise Unreadable(f"nested more than {MAX_DEPTH} deep", mark=mark)
        self.document.values[path] = mark
        if isinstance(node, MappingNode) and node.tag == f"{TAG}map":
            return self._mapping(node, path, (*above, node))
        if isinstance(node, SequenceNode) and node.tag == f"{TAG}seq":
            within = (*above, node)
            return [self._value(one, _join(path, str(i)), within) for i, one in enumerate(node.value)]
        if isinstance(node, ScalarNode):
            return self._scalar(node, path, mark)
        return self._problem(path, mark, _tag(node), "expected plain YAML", "remove the tag")

    def _mapping(self, node: MappingNode, path: str, above: tuple[Node, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            mark = Mark(key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            key = key_node.value
            if key_node.tag.startswith("!"):
                self._problem(path, mark, _tag(key_node), "expected plain YAML", "remove the tag")
                continue
            if not isinstance(key, str) or key_node.tag != f"{TAG}str" or not key.isprintable():
                shown = key if isinstance(key, str) else "a list or a mapping"
                self._problem(path, mark, f"{shown} as a key", "expected a word")
                continue
            below = _join(path, key)
            if key == "<<":
                self._problem(path, mark, "the merge key <<", "expected plain keys", "write the keys out")
            elif key in found:
                first = lines[key]
                where = f"lines {first} and {mark.line}" if first != mark.line else f"line {first}"
                self._problem(below, mark, "", f"given twice, in {where}", "keep one")
            else:
                lines[key] = mark.line
                self.document.keys[below] = mark
                found[key] = self._value(value_node, below, above)
        return found

    def _scalar(self, node: ScalarNode, path: str, mark: Mark) -> Any:
        text, kind = node.value, node.tag.removeprefix(TAG)
        try:
            match kind:
                case "str" if NO_TEXT.search(text):
                    return self._problem(
                        path, mark, repr(text)[:60], "expected text without NUL or lone surrogates"
                    )
                case "str":
                    return text
                case "null" | "bool":
                    return WORDS[text.lower()]
                case "int":
                    return int(text)
                case "float":
                    return self._finite(text, path, mark)
        except (KeyError, ValueError):
            pass
        return self._problem(path, mark, f"{_tag(node)} {text!r}", "expected plain YAML", "remove the tag")

    def _finite(self, text: str, path: str, mark: Mark) -> float | None:
        number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if math.isfinite(number):
            return number
        self._problem(path, mark, text[:40], "expected a finite number")
        return None

    def _problem(self, path: str, mark: Mark, found: str, expected: str, nearest: str = "") -> None:
        self.document.problems.append(Problem(path, found, expected, nearest, mark.line, mark.column))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _tag(node: Node) -> str:
    return "tag " + str(node.tag).replace(TAG, "!!")
