"""`xtrain import`: a spec that runs, what was decided beside it, and untrusted input refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from xtrain.cli import main

GOOD = '{"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "what": 1}'


def import_text(folder: Path, text: str | bytes, *options: str) -> Result:
    path = folder / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return CliRunner().invoke(main, ["import", str(path), *options])


def test_the_spec_is_on_standard_output_and_what_was_decided_on_standard_error(tmp_path: Path) -> None:
    done = import_text(tmp_path, GOOD)
    assert done.exit_code == 0
    assert "batch:\n  global: 8\n  micro: 2\n" in done.stdout
    assert "not carried: what: 1: unknown to DeepSpeed" in done.stderr
    assert all(f"#   {line}" in done.stdout for line in done.stderr.splitlines())


def test_the_written_spec_passes_the_check(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    assert import_text(tmp_path, GOOD, "--out", str(spec)).stdout == ""
    done = CliRunner().invoke(main, ["check", str(spec), "--backend", "deepspeed"])
    assert done.exit_code == 0, done.stderr


def test_a_spec_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("mine")
    done = import_text(tmp_path, GOOD, "--out", str(spec))
    assert done.exit_code == 2
    assert spec.read_text() == "mine"
    assert "exists; name a new file with --out" in done.stderr


BATCH = '"train_batch_size": 8'
BAD: list[tuple[str | bytes, str]] = [
    ("", "1:1: not JSON"),
    ("{", "not JSON"),
    ("[]", "expected a mapping"),
    ("3", "expected a mapping"),
    (b"\xff\xfe", "is not UTF-8"),
    ('{"a": 1, "a": 2}', "the key 'a' is given twice; keep one"),
    ('{"zero_optimization": {"stage": 2, "stage": 3}}', "the key 'stage' is given twice"),
    (
        '{"train_batch_size": NaN}',
        "config.json has 1 problem\n  train_batch_size: found NaN, expected a finite",
    ),
    ('{"train_batch_size": 1e999}', "train_batch_size: found Infinity, expected a finite number"),
    (
        f'{{{BATCH}, "optimizer": {{"params": {{"betas": [0.9, -1e999]}}}}}}',
        "optimizer.params.betas.1: found -Infinity, expected a finite number",
    ),
    ('{"train_batch_size": ' + "9" * 5000 + "}", "config.json: "),
    ("[" * 100_000, "nested"),
    ('{"a":' * 50 + "1" + "}" * 50, "nested more than 20 deep"),
    (" " * (1 << 20) + "{}", "larger than 1 MiB"),
    ("{}", "expected train_batch_size or train_micro_batch_size_per_gpu"),
    ('{"train_batch_size": "eight"}', "train_batch_size: found 'eight', expected a whole number >= 1"),
    ('{"train_batch_size": true}', "train_batch_size: found true, expected a whole number >= 1"),
    ('{"train_batch_size": 0}', "train_batch_size: found 0, expected a whole number >= 1"),
    ('{"train_batch_size": 1' + "0" * 40 + "}", "expected"),
    ('{"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3}', "expected a multiple of 3"),
    (f'{{{BATCH}, "zero_optimization": 3}}', "zero_optimization: found 3, expected a section"),
    (f'{{{BATCH}, "zero_optimization": {{"stage": 4}}}}', "zero_optimization.stage: found 4, expected"),
    (f'{{{BATCH}, "zero_optimization": {{"offload_optimizer": "cpu"}}}}', "expected a section"),
    (f'{{{BATCH}, "fp16": {{"enabled": true, "hysteresis": 0}}}}', "precision.hysteresis: found 0"),
    (f'{{{BATCH}, "gradient_accumulation_steps": {2**62}, "train_micro_batch_size_per_gpu": 8}}', "expected"),
    (f'{{"gradient_accumulation_steps": {2**62}, "train_micro_batch_size_per_gpu": 8}}', "batch.global"),
    (f'{{{BATCH}, "fp16": true}}', "fp16: found true, expected a section"),
    (f'{{{BATCH}, "fp16": "auto"}}', "fp16: found 'auto', expected a section"),
    (f'{{{BATCH}, "gradient_clipping": -1}}', "gradient_clipping: found -1, expected a number >= 0"),
    (f'{{{BATCH}, "optimizer": {{"type": 3}}}}', "optimizer.type: found 3, expected text"),
    (
        f'{{{BATCH}, "optimizer": {{"type": "Adam", "params": {{"lr": "x"}}}}}}',
        "optimizer.params.lr: found 'x'",
    ),
    (f'{{{BATCH}, "optimizer": {{"type": "Adam", "params": {{"betas": [1]}}}}}}', "optimizer.params.betas"),
    (f'{{{BATCH}, "optimizer": {{"type": "Adam", "params": []}}}}', "optimizer.params: found [], expected"),
    (f'{{{BATCH}, "scheduler": {{"type": "WarmupLR", "params": {{"warmup_num_steps": -1}}}}}}', "found -1"),
    ('{"learning_rate": "fast"}', "learning_rate: found 'fast', expected a number > 0"),
    ('{"learning_rate": 1e-4, "max_steps": 5, "warmup_steps": 50}', "schedule.warmup: found 50"),
    ('{"learning_rate": 1e-4, "adam_beta1": 3}', "optimizer.betas"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[str(text)[:60] for text, _ in BAD])
def test_bad_input_is_refused_without_a_traceback(tmp_path: Path, text: str | bytes, message: str) -> None:
    done = import_text(tmp_path, text)
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert isinstance(done.exception, SystemExit)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["import", str(tmp_path / "none.json")])
    assert done.exit_code == 2
    assert "none.json: cannot be read: No such file or directory" in done.stderr


def test_names_in_the_file_cannot_break_out_of_a_comment(tmp_path: Path) -> None:
    done = import_text(tmp_path, '{"train_batch_size": 8, "a\\ntrain: {steps: 5}": 1, "b": "x\\ny: 1"}')
    assert done.exit_code == 0
    assert "\ntrain: {steps" not in done.stdout
    assert "\ny: 1" not in done.stdout


def test_a_config_that_is_only_named_in_the_arguments_is_not_carried(tmp_path: Path) -> None:
    done = import_text(tmp_path, '{"learning_rate": 1e-4, "deepspeed": "ds.json"}')
    assert done.exit_code == 0
    assert "not carried: deepspeed: ds.json: not read; import it with --arguments config.json" in done.stderr


def test_arguments_beside_arguments_are_refused(tmp_path: Path) -> None:
    done = import_text(tmp_path, '{"learning_rate": 1e-4}', "--arguments", str(tmp_path / "config.json"))
    assert done.exit_code == 2
    assert "already TrainingArguments; --arguments goes with a config" in done.stderr
