"""The page in a real browser: nothing complains, nothing is fetched, everything is drawn and can be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.browser import CHROMIUM, Browser, running_browser
from tests.report.sample_lanes import (
    STEP,
    compared,
    lane,
    memory,
    on_rung,
    run,
    slowed,
    steps,
    unfinished,
)
from xtrain.report.charts import charts
from xtrain.report.comparison import Comparison
from xtrain.report.write import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)"),
]

LARGEST_PAGE_BYTES = 6_000_000
LOOKS = [(1280, False), (1280, True), (390, False), (390, True)]


def full_comparison() -> Comparison:
    """Everything that a page can show."""
    predicted = {"peak_bytes": {"cpu": {"parameters": 40 << 20, "activations": 130 << 20}}}
    first = lane("cpu", run(steps(shake=0.1), predicted=predicted), run(slowed(steps(), 1.02)))
    lean = [memory({**STEP, "activations": 40})]
    second = lane("deepspeed:2", run(slowed(steps(lr=1.01e-3, shake=0.2), 1.1), memory=lean))
    refused = unfinished("<b>mps</b>", "backend 'mps' cannot run here: no Apple GPU", "refused")
    return compared(on_rung(first, 0, "cpu"), on_rung(second, 1, "cpu"), refused)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, full_comparison())
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


def test_the_page_is_small_enough_to_send(page: Path) -> None:
    assert page.stat().st_size < LARGEST_PAGE_BYTES


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_the_page_is_drawn_without_a_complaint_or_a_request(
    browser: Browser, page: Path, width: int, dark: bool
) -> None:
    browser.open(page, width, dark)
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.resolve().as_uri()]

    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    too_wide = (
        "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth)"
    )
    assert browser.evaluate(f"{too_wide}.map(e => e.tagName + '.' + e.className)") == []

    pixels = np.asarray(browser.picture())
    for chart in charts(full_comparison()):
        x, y, w, h = (round(value) for value in browser.box(f"#{chart.name}"))
        for colour in drawn_colours(chart.data):
            assert count_near(pixels[y : y + h, x : x + w], colour) > 15, (chart.name, colour)
    x, y, _, _ = (round(value) for value in browser.box(".card"))
    assert (pixels[y + 12 : y + 18, x + 8 : x + 14].mean() < 128) == dark


@pytest.fixture(scope="module")
def page_of_eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lanes with the long names of a ladder."""
    folder = tmp_path_factory.mktemp("eight")
    names = [
        f"{engine} + activation checkpointing {n}" for engine in ("cpu", "deepspeed:2") for n in range(4)
    ]
    write_report(folder, compared(*(lane(name) for name in names)))
    return folder / "report.html"


OVERLAPPING = """
[...document.querySelectorAll('.chart')].flatMap(chart => {
  const boxes = [...chart.querySelectorAll('.ytick text')].map(e => e.getBoundingClientRect());
  boxes.sort((a, b) => a.top - b.top);
  return boxes.slice(1).filter((box, i) => box.top < boxes[i].bottom - 1).map(() => chart.id);
})"""


@pytest.mark.parametrize("width", [1280, 390])
def test_the_names_of_eight_lanes_do_not_run_into_each_other(
    browser: Browser, page_of_eight: Path, width: int
) -> None:
    browser.open(page_of_eight, width, dark=False)
    assert browser.evaluate("document.querySelectorAll('#speed .ytick text').length") == 8
    assert browser.evaluate(OVERLAPPING) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_names_from_records_are_read_as_they_are(browser: Browser, page: Path) -> None:
    browser.open(page, 1280, dark=False)
    assert "<b>mps</b>" in browser.evaluate("document.querySelector('.lane.failed').innerText")


def test_the_browser_would_notice(browser: Browser, tmp_path: Path) -> None:
    """What the tests above rely on: complaints, requests, and a page that is too wide are seen."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<div style='width: 3000px'>x</div><img src='http://127.0.0.1:9/x.png'>"
        "<script>console.error('no'); undefined.x</script>"
    )
    browser.open(bad, 390, dark=False)
    assert len(browser.complaints) >= 2
    assert "http://127.0.0.1:9/x.png" in browser.requests
    assert browser.evaluate("document.documentElement.scrollWidth") > 390


def drawn_colours(data: list[dict[str, Any]]) -> list[str]:
    """Of bars and whole curves; what is half transparent has another colour on the page."""
    marks = [
        trace["line"] if "line" in trace else trace["marker"]
        for trace in data
        if trace.get("opacity", 1) == 1
    ]
    colours = [mark["color"] for mark in marks if "color" in mark]
    return [one for colour in colours for one in (colour if isinstance(colour, list) else [colour])]


def count_near(pixels: NDArray[np.uint8], colour: str) -> int:
    """Pixels of about that colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels.astype(int) - wanted).max(axis=-1) < 24).sum())
