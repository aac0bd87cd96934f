from __future__ import annotations

import pytest

from xtrain.contract import Trace
from xtrain.measure.trace import NullTrace, SampledTrace, is_traced


@pytest.mark.parametrize(
    ("total", "traced"),
    [(0, []), (1, [0]), (3, [2]), (6, [5]), (30, [5]), (31, [5, 30]), (60, [5, 30, 55])],
)
def test_few_steps_are_traced_and_short_runs_trace_their_last(total: int, traced: list[int]) -> None:
    assert [step for step in range(total) if is_traced(step, total)] == traced


class Device:
    """Remembers the order in which it was asked."""

    def __init__(self, *live_bytes: int | None) -> None:
        self.live_bytes = list(live_bytes)
        self.asked: list[str] = []

    def synchronize(self) -> None:
        self.asked.append("synchronize")

    def sample(self) -> int | None:
        self.asked.append("sample")
        return self.live_bytes.pop(0)


def test_a_span_waits_for_the_device_before_and_after_and_before_each_sample() -> None:
    device = Device(1, 2)
    trace: Trace = SampledTrace(device.synchronize, device.sample)
    with trace.span("forward"):
        device.asked.append("forward")
    before, after = device.asked.index("forward"), len(device.asked)
    assert device.asked[:before] == ["synchronize", "sample"]
    assert device.asked[before + 1] == "synchronize"
    assert device.asked[after - 1] == "sample"


def test_spans_of_a_phase_add_up_and_the_largest_sample_is_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr("xtrain.measure.trace.perf_counter", lambda: next(clock))
    device = Device(10, 50, 50, 90, 90, 20)
    trace = SampledTrace(device.synchronize, device.sample)
    for phase in ("forward", "backward", "forward"):
        with trace.span(phase):
            pass
    assert trace.seconds == {"forward": 5.0, "backward": 2.0}
    assert trace.peak_live_bytes == 90


def test_a_device_that_cannot_tell_has_no_peak() -> None:
    device = Device(None, None)
    trace = SampledTrace(device.synchronize, device.sample)
    with trace.span("forward"):
        pass
    assert trace.peak_live_bytes is None


def test_a_span_inside_another_takes_its_time_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 5.0, 8.0, 8.0, 10.0])
    monkeypatch.setattr("xtrain.measure.trace.perf_counter", lambda: next(clock))
    device = Device(10, 20)
    trace = SampledTrace(device.synchronize, device.sample)
    with trace.span("backward"), trace.span("reduce"):
        device.asked.append("reduce")
    assert trace.seconds == {"backward": 7.0, "reduce": 3.0}
    inner = ["synchronize", "reduce", "synchronize"]
    assert device.asked == ["synchronize", "sample", *inner, "synchronize", "sample"]


def test_an_error_in_a_span_passes_without_asking_the_device_again() -> None:
    device = Device(1)
    trace = SampledTrace(device.synchronize, device.sample)
    with pytest.raises(ZeroDivisionError), trace.span("forward"):
        raise ZeroDivisionError
    assert device.asked == ["synchronize", "sample"]


def test_the_null_trace_measures_nothing_and_nests_freely() -> None:
    trace: Trace = NullTrace()
    with trace.span("forward"), trace.span("forward"):
        pass
    assert NullTrace().seconds == {}
    assert NullTrace().peak_live_bytes is None
