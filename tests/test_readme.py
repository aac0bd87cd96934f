"""What the README and the guides tell people to type exists, and what they link to is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from xtrain import contract, registry
from xtrain.cli import main
from xtrain.spec import load_spec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    page.relative_to(ROOT)
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"))
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Command lines of a page's shell blocks, as words."""
    lines = "\n".join(blocks((ROOT / page).read_text(), "sh")).splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def all_commands(program: str) -> Iterator[list[str]]:
    for page in PAGES:
        yield from (words for words in commands(page) if Path(words[0]).name == program)


XTRAIN_COMMANDS = list(all_commands("xtrain"))
MAKE_COMMANDS = list(all_commands("make"))


def test_readme_shows_a_first_command_and_a_comparison() -> None:
    assert commands(Path("README.md"))[0] == ["make", "run"]
    assert {words[1] for words in XTRAIN_COMMANDS} >= {"run", "compare", "backends", "check"}


@pytest.mark.parametrize("words", XTRAIN_COMMANDS, ids=" ".join)
def test_xtrain_command_is_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    context = main.commands[words[1]].make_context(words[1], words[2:])  # raises on what it does not know
    assert context.args == []


@pytest.mark.parametrize("words", XTRAIN_COMMANDS, ids=" ".join)
def test_files_and_backends_of_an_xtrain_command_exist(words: list[str]) -> None:
    assert all((ROOT / word).exists() for word in words if word.endswith((".yaml", ".yml")))
    named = [value for option, value in pairwise(words) if option.startswith("--backend")]
    lanes = [lane.partition(":")[0] for value in named for lane in value.split(",")]
    assert set(lanes) <= {*registry.names(), "auto"}


@pytest.mark.parametrize("words", MAKE_COMMANDS, ids=" ".join)
def test_make_target_exists(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {word for word in words[1:] if "=" not in word} <= targets


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text())
    local = [link for link in links if not link.startswith(("http://", "https://"))]
    assert [link for link in local if not (ROOT / page.parent / link).exists()] == []


def test_readme_spec_is_valid(tmp_path: Path) -> None:
    (text,) = blocks(README, "yaml")
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    assert load_spec(path).train.steps == 200


def test_backend_table_names_exactly_the_registered_backends() -> None:
    table = README.partition("## Backends")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == [
        "cpu",
        "mps",
        "cuda",
        "deepspeed",
        "null",
    ]
    assert registry.names() == sorted(["cpu", "mps", "cuda", "deepspeed", "null"])


def test_layout_names_every_folder() -> None:
    table = README.partition("## Layout")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `(\w+)/` \|", table, flags=re.MULTILINE))
    assert all((ROOT / name).is_dir() for name in named)
    assert named >= {"xtrain", "backends", "configs", "benchmarks", "tests", "docs"}


@pytest.mark.parametrize("protocol", [contract.Backend, contract.Engine])
def test_guide_for_backends_explains_every_member_of_the_contract(protocol: type) -> None:
    guide = (ROOT / "docs" / "backends.md").read_text()
    members = {*vars(protocol), *protocol.__annotations__}
    public = {name for name in members if not name.startswith("_")}
    assert public
    assert {name for name in public if not re.search(rf"`{name}\b", guide)} == set()


def test_no_output_is_left_to_be_filled_in() -> None:
    assert "REAL OUTPUT" not in (ROOT / "README.md").read_text()
