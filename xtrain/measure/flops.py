"""Speed in the field's terms: floating point operations per second, and what share of the device's that is.

A token costs 6 N + 12 L H T operations, forward and backward: N parameters (tied ones once), L layers of
width H, T tokens in a sequence (Chowdhery et al. 2022, appendix B).
Recomputation is not counted: these are the model's operations, not the machine's.
"""

from __future__ import annotations

from typing import Any

from xtrain.records.record import Part, RunRecord


class FieldSpeed(Part):
    """Of a run. What cannot be known is None."""

    samples_per_second: float | None
    flops_per_token: float | None
    attention_counted: bool
    """Whether the model's layers and width are known, so that 12 L H T is in it."""
    flops_per_second: float | None
    utilisation: float | None
    """MFU against the measured matrix product."""
    datasheet_utilisation: float | None


def flops_per_token(parameters: int, layers: int, hidden: int, seq_len: int) -> float:
    """With layers or hidden 0, that is unknown, attention's products are left out."""
    return 6.0 * parameters + 12.0 * layers * hidden * seq_len


def field_speed(record: RunRecord, tokens_per_second: float) -> FieldSpeed:
    """From a record that is not trusted; `tokens_per_second` is a sound one, of target tokens.

    A masked token is computed like any other, so operations are those of whole sequences where the spec
    tells their length.
    """
    sequences, seq_len = _number(record.spec, "batch", "global"), _number(record.spec, "data", "seq_len")
    layers, hidden = record.model.layers or 0, record.model.hidden or 0
    per_token = flops_per_token(record.model.parameters, layers, hidden, seq_len or 0) or None
    tokens_per_step = record.totals.tokens / record.totals.steps if record.totals.steps else 0.0
    steps_per_second = tokens_per_second / tokens_per_step if tokens_per_step else None
    samples = sequences * steps_per_second if sequences and steps_per_second else None
    processed = samples * seq_len if samples and seq_len else tokens_per_second
    rate = per_token * processed if per_token else None
    peak = record.matmul
    return FieldSpeed(
        samples_per_second=samples,
        flops_per_token=per_token,
        attention_counted=bool(layers and hidden and seq_len),
        flops_per_second=rate,
        utilisation=rate / peak.flops_per_second if rate and peak else None,
        datasheet_utilisation=rate / peak.datasheet if rate and peak and peak.datasheet else None,
    )


def _number(spec: dict[str, Any], section: str, key: str) -> int | None:
    found = spec.get(section)
    value = found.get(key) if isinstance(found, dict) else None
    return value if isinstance(value, int) and 0 < value < 1 << 31 else None
