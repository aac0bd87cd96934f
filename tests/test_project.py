"""The rules of the house that no type checker sees: what is pinned, packaged, and who imports whom."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from xtrain import registry

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
BACKENDS = sorted(folder for folder in (ROOT / "backends").iterdir() if (folder / "__init__.py").exists())
WORK_TARGETS = ("check", "run", "test", "lint", "types", "bench", "gpu", "format")


# --- what is declared ----------------------------------------------------------------------------


def declared() -> list[Requirement]:
    """Every requirement of pyproject.toml: to run, to build, and all extras."""
    project = PROJECT["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [
        Requirement(line)
        for line in (*project["dependencies"], *extras, *PROJECT["build-system"]["requires"])
    ]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_every_dependency_is_pinned_to_a_version_that_pyproject_allows(requirement: Requirement) -> None:
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned is not None, f"constraints.txt has no line for {requirement.name}"
    assert requirement.specifier.contains(pinned)


def test_torch_is_pinned_without_the_tag_of_one_build() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", pins()["torch"])


@pytest.mark.parametrize(("platform", "expected"), [("linux", True), ("darwin", False)])
def test_deepspeed_comes_by_default_on_linux_only(platform: str, expected: bool) -> None:
    requirements = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    environment = {"sys_platform": platform}
    installed = {r.name for r in requirements if r.marker is None or r.marker.evaluate(environment)}
    assert ("deepspeed" in installed) is expected


def test_python_3_11_is_the_oldest_everywhere() -> None:
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert PROJECT["tool"]["mypy"]["python_version"] == "3.11"
    assert PROJECT["tool"]["ruff"]["target-version"] == "py311"


def test_types_are_checked_strictly_in_xtrain_and_in_backends() -> None:
    mypy = PROJECT["tool"]["mypy"]
    assert mypy["strict"] is True
    assert {"xtrain", "backends"} <= set(mypy["files"])


def test_every_folder_with_an_init_file_is_packaged() -> None:
    found = {init.parent.relative_to(ROOT) for top in ("xtrain", "backends") for init in inits(top)}
    names = {".".join(folder.parts).replace("backends", "xtrain.backends", 1) for folder in found}
    assert names == set(PROJECT["tool"]["setuptools"]["packages"])


def inits(top: str) -> list[Path]:
    return sorted((ROOT / top).rglob("__init__.py"))


@pytest.mark.parametrize("name", PROJECT["project"]["entry-points"]["xtrain.backends"])
def test_entry_point_leads_to_a_backend_of_that_name(name: str) -> None:
    assert registry.load(name).name == name


# --- who may know what ---------------------------------------------------------------------------


def imported(tree: ast.AST, package: tuple[str, ...]) -> set[str]:
    """Dotted names that a module of `package` imports, relative ones made absolute."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def lies_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def device_knowledge(source: str) -> list[str]:
    """Where a module of xtrain/ names what belongs in backends/: libraries, vendors, devices."""
    tree = ast.parse(source)
    foreign = ("deepspeed", "xtrain.backends", "backends", "torch.cuda", "torch.mps", "torch.xpu")
    found = [name for name in imported(tree, ()) if any(lies_in(name, package) for package in foreign)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {"cuda", "mps", "xpu"}:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Constant) and re.fullmatch(r"(cuda|mps|xpu):\d+|nccl|gloo", str(node.value)):
            found.append(repr(node.value))
    return sorted(found)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "xtrain").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_xtrain_names_no_device_and_no_library_of_a_backend(path: Path) -> None:
    assert device_knowledge(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import deepspeed",
        "from deepspeed.runtime import config",
        "def f() -> None:\n    import deepspeed.comm as comm",
        "import torch\ntorch.cuda.synchronize()",
        "from torch import mps",
        "tensor.cuda()",
        "device = 'cuda:0'",
        "init_process_group('nccl')",
        "from xtrain.backends.manual import cpu",
    ],
)
def test_device_knowledge_is_recognised(source: str) -> None:
    assert device_knowledge(source)


@pytest.mark.parametrize("folder", BACKENDS, ids=lambda folder: folder.name)
def test_backend_imports_neither_the_cli_nor_another_backend(folder: Path) -> None:
    others = [f"backends.{other.name}" for other in BACKENDS if other != folder]
    forbidden = ["xtrain.cli", "xtrain.__main__", "xtrain.backends", *others]
    for path in sorted(folder.rglob("*.py")):
        package = path.parent.relative_to(ROOT).parts
        names = imported(ast.parse(path.read_text()), package)
        offending = [name for name in names if any(lies_in(name, package) for package in forbidden)]
        assert offending == [], path


def test_relative_import_of_a_neighbour_is_recognised() -> None:
    tree = ast.parse("from ..manual.devices import Cpu")
    assert imported(tree, ("backends", "null")) == {"backends.manual.devices.Cpu"}


# --- what is built and run ------------------------------------------------------------------------


def test_ci_runs_all_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("\nmake test")


def dry_run(folder: Path, target: str) -> str:
    """What make would do for `target` in a fresh checkout, where there is no .venv."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", WORK_TARGETS)
def test_target_installs_first_and_torch_by_its_pin_before_all_else(target: str, tmp_path: Path) -> None:
    commands = dry_run(tmp_path, target)
    order = ["-m venv .venv", "install --constraint constraints.txt torch", "--editable '.[dev]'"]
    assert sorted(order, key=commands.index) == order
    after = commands[commands.index("touch .venv/.ready") :]
    assert ".venv/bin/" in after


@pytest.mark.slow
def test_make_alone_leaves_slow_tests_out_and_make_test_does_not(tmp_path: Path) -> None:
    assert '-m "not slow"' in dry_run(tmp_path, "check")
    assert "not slow" not in dry_run(tmp_path, "test")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("xtrain", "backends"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder / "dist")]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(folder)], check=True)
    (built,) = (folder / "dist").glob("xtrain-*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_the_backends_inside_the_namespace_and_nothing_beside_it(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    assert "xtrain/backends/manual/engine.py" in names
    assert "xtrain/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"xtrain", next(top for top in tops if top.endswith(".dist-info"))}


@pytest.mark.slow
def test_wheel_lists_its_backends_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    ZipFile(wheel).extractall(tmp_path / "site")
    program = "import xtrain; print(xtrain.__file__); from xtrain import registry; print(registry.names())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    origin, names = done.stdout.splitlines()
    assert Path(origin).is_relative_to(tmp_path)
    assert names == str(sorted(PROJECT["project"]["entry-points"]["xtrain.backends"]))
