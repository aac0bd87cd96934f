"""The page as text: self-contained, and safe whatever a record says. test_page_in_browser.py looks at it."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.report.sample_lanes import STEP, compared, lane, memory, run, slowed, steps, unfinished
from xtrain.records.record import DataFacts, ModelFacts
from xtrain.report.charts import Chart, charts, label
from xtrain.report.colours import lane_colours
from xtrain.report.comparison import Comparison
from xtrain.report.page import render_page
from xtrain.report.write import write_report

EVIL = '</script><script>alert("x")</script><img src=https://example.org/x.png onerror=alert(1)>&lt;b&gt;'


def page(comparison: Comparison) -> str:
    return render_page(comparison, library="/* the library */")


class Tags(HTMLParser):
    """Every element with its attributes, and what is between script tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def charts_of(text: str) -> list[dict[str, Any]]:
    (data,) = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', text, re.DOTALL)
    return list(json.loads(data))


def evil_lanes() -> Comparison:
    held = memory({**STEP, EVIL: 5})
    record = run(
        memory=[held],
        environment={"cpu": EVIL, "packages": {EVIL: EVIL}, "platform": {"a": [EVIL]}},
        model=ModelFacts(description=EVIL, parameters=1),
        data=DataFacts(description=EVIL, hash=EVIL, portable=True),
        matmul_precision=EVIL,
        spec={"precision": {"dtype": EVIL, "weights": EVIL}, EVIL: EVIL},
    )
    return compared(lane("a"), lane(EVIL, record), unfinished("c", EVIL))


def test_nothing_from_a_record_is_markup() -> None:
    text = page(evil_lanes())
    harmless = Tags(page(compared(lane("a"), lane("b"), unfinished("c", "full")))).found
    assert {tag for tag, _ in Tags(text).found} <= {tag for tag, _ in harmless}
    assert text.count("<script") == 3
    assert "&lt;/script&gt;" in text
    assert not any("onerror" in attributes for _, attributes in Tags(text).found)


def test_text_in_charts_has_no_tags_for_the_library_either() -> None:
    assert label("<b>x</b> & y") == "&lt;b&gt;x&lt;/b&gt; &amp; y"
    assert label("cpu precision=bf16 batch.micro=8") == "cpu precision=bf16<br>batch.micro=8"
    long = [f"deepspeed:2 {' '.join(['memory.checkpointing=auto'] * 3)} batch.micro={n}" for n in (4, 8)]
    assert label(long[0]) != label(long[1])
    for chart in charts(evil_lanes()):
        names = [trace.get("name", "") for trace in chart.data]
        names += [str(place) for trace in chart.data for place in trace.get("y", ())]
        assert not any("<" in name.replace("<br>", "") for name in names)


def test_the_page_names_no_address() -> None:
    attributes = [value for _, found in Tags(page(evil_lanes())).found for value in found.values() if value]
    assert not [value for value in attributes if re.match(r"\s*(https?:)?//", value)]


def test_scripts_run_by_their_hash_alone() -> None:
    text = page(compared(lane("a")))
    (policy,) = [found["content"] for tag, found in Tags(text).found if "http-equiv" in found]
    assert str(policy).startswith("default-src 'none'; script-src 'sha256-")
    assert str(policy).count("sha256-") == 2
    assert "unsafe-inline" not in str(policy).partition("script-src")[2].partition(";")[0]


def test_every_chart_has_its_place() -> None:
    text = page(compared(lane("a"), lane("b", run(steps(lr=2e-3)))))
    names = [chart["name"] for chart in charts_of(text)]
    assert names == ["speed", "memory", "losses", "distance", "time", "memory-live", "memory-rss"]
    assert all(f'id="{name}"' in text for name in names)


def test_what_was_not_measured_has_no_chart() -> None:
    bare = run([], speed=None, time_split=None, memory=[])
    assert charts(compared(lane("a", bare))) == []
    assert "not measured" in page(compared(lane("a", bare)))


def test_predictions_are_drawn_beside_what_was_measured() -> None:
    predicted = {"peak_bytes": {"cpu": {"parameters": 40 << 20, "activations": 130 << 20}}}
    drawn = {chart.name: chart for chart in charts(compared(lane("a", run(predicted=predicted))))}
    assert drawn["predicted"].data[0]["y"] == ["a, predicted", "a, measured"]
    assert drawn["predicted"].data[0]["x"] == [40.0, 40.0]


@pytest.mark.parametrize("predicted", [{}, {"peak_bytes": 3}, {"peak_bytes": {"cpu": "x", "parameters": -1}}])
def test_an_unknown_prediction_is_none(predicted: dict[str, Any]) -> None:
    names = [chart.name for chart in charts(compared(lane("a", run(predicted=predicted))))]
    assert "predicted" not in names


def test_what_all_lanes_have_alike_is_said_once() -> None:
    environment = {"platform": "one and the same", "python": "3.11.0"}
    other = {**environment, "python": "3.12.0"}
    text = page(compared(lane("a", run(environment=environment)), lane("b", run(environment=other))))
    assert '<td data-label="all lanes" colspan="2">one and the same</td>' in text
    assert '<td data-label="a">3.11.0</td><td data-label="b">3.12.0</td></tr>' in text


def test_lanes_are_told_apart_by_their_colour() -> None:
    assert len(set(lane_colours(compared(*(lane(str(n)) for n in range(12)))).values())) == 12


def test_lanes_whose_labels_are_cut_alike_keep_their_bars() -> None:
    """Only the middle tells them apart, and a label has none."""
    predicted = {"peak_bytes": {"cpu": {"parameters": 40 << 20}}}
    names = [f"deepspeed:2 batch.micro=4 precision={p} memory.checkpointing={{every: 2}}" for p in "abc"]
    assert len({label(name) for name in names}) == 1
    slow = [run(slowed(steps(), 1.0 + n / 10), predicted=predicted) for n in range(3)]
    drawn = {
        chart.name: chart.data
        for chart in charts(compared(*(lane(name, one) for name, one in zip(names, slow, strict=True))))
    }
    assert {name: len(set(drawn[name][0]["y"])) for name in ("speed", "memory", "time", "predicted")} == {
        **dict.fromkeys(("speed", "memory", "time"), 3),
        "predicted": 6,
    }
    assert len({trace["name"] for trace in drawn["losses"]}) == 3


def test_lanes_with_names_of_any_length_are_drawn_apart() -> None:
    comparison = compared(lane("x" * 600, run(steps())), lane("x" * 600 + "y", run(steps(lr=2e-3))))
    assert len({one.name for one in comparison.lanes}) == 2
    assert comparison.reference == comparison.lanes[0].name
    (distance,) = [chart for chart in charts(comparison) if chart.name == "distance"]
    assert len(distance.data) == 1
    assert len(page(comparison)) < 200_000


def test_long_runs_are_thinned_out() -> None:
    (losses,) = [c for c in charts(compared(lane("a", run(steps(5000))))) if c.name == "losses"]
    drawn = losses.data[0]["x"]
    assert len(drawn) <= 400
    assert (drawn[0], drawn[-1]) == (1, 5000)


def test_charts_are_what_the_library_takes() -> None:
    """plotly's own schema refuses keys and values that it does not know."""
    from plotly import graph_objects

    drawn: list[Chart] = charts(compared(lane("a"), lane("b", run(steps(lr=2e-3)))))
    for chart in drawn:
        graph_objects.Figure(data=chart.data, layout=chart.layout)
    with pytest.raises(ValueError):
        graph_objects.Figure(data=[{"type": "bar", "heigth": 1}])


def test_without_the_library_the_rest_is_written_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html").write_text("of other numbers")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    write_report(tmp_path, compared(lane("a")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
    assert capsys.readouterr().err == (
        f"note: no {tmp_path / 'report.html'}: the page needs plotly, which came with xtrain "
        "and is not there any more: pip install plotly\n"
    )
