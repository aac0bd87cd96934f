"""Every shipped config can be run: it has no problems on the backends its `# backends:` line names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xtrain import registry
from xtrain.spec import load_spec

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for suffix in ("*.yaml", "*.yml") for path in (ROOT / "configs").rglob(suffix))


def backends_of(config: Path) -> list[str]:
    """Those of the line `# backends: cpu, deepspeed`; cpu where there is none."""
    named = re.search(r"^# backends: (.+)$", config.read_text(), flags=re.MULTILINE)
    return [name.strip() for name in named[1].split(",")] if named else ["cpu"]


CASES = [(config, backend) for config in CONFIGS for backend in backends_of(config)]


def test_configs_were_found() -> None:
    assert ROOT / "configs" / "quickstart.yaml" in CONFIGS


@pytest.mark.parametrize(
    ("config", "backend"), CASES, ids=lambda case: case.stem if isinstance(case, Path) else case
)
def test_shipped_config_has_no_problems(config: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # paths in configs/ are relative to the repository
    monkeypatch.setenv("XTRAIN_EMULATED_FP16", "1")  # most CPUs have no fp16 of their own
    spec = load_spec(config)
    assert registry.load(backend).problems(spec, spec.launch.processes) == []


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_every_shipped_config_is_for_a_backend_that_trains(config: Path) -> None:
    assert set(backends_of(config)) - {"null"}


def test_quickstart_runs_on_every_real_backend() -> None:
    quickstart = ROOT / "configs" / "quickstart.yaml"
    assert set(backends_of(quickstart)) == set(registry.names()) - {"null"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_every_key_is_explained(config: Path) -> None:
    lines = config.read_text().splitlines()
    keys = [line for line in lines if re.match(r"( +[\w-]+:| *[\w-]+: +\S)", line)]
    assert len(keys) >= 8
    assert [line for line in keys if " # " not in line] == []
