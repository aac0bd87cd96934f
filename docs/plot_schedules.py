"""Draws docs/plots/*.svg, one plot per schedule, from the functions that training uses.

Run it again after a change: python -m docs.plot_schedules
"""

from __future__ import annotations

from pathlib import Path

from xtrain.schedule import factor
from xtrain.spec.tree import WSD, Constant, Cosine, Linear, Schedule, WarmupDecay

STEPS = 1000
WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 548, 16, 196
"""The edges of the plot in the picture, in pixels."""

PLOTS: dict[str, dict[str, Schedule]] = {
    "constant": {
        "warmup: 0": Constant(name="constant"),
        "warmup: 200": Constant(name="constant", warmup=200),
    },
    "linear": {
        "warmup: 0": Linear(name="linear"),
        "warmup: 200": Linear(name="linear", warmup=200),
    },
    "cosine": {
        "warmup: 100": Cosine(warmup=100),
        "warmup: 100, min_ratio: 0, cycles: 1.5": Cosine(warmup=100, min_ratio=0.0, cycles=1.5),
    },
    "wsd": {
        "warmup: 100, stable: 600, decay: 300": WSD(name="wsd", warmup=100, stable=600, decay=300),
        "warmup: 100, stable: 300, decay: 400, min_ratio: 0.1": WSD(
            name="wsd", warmup=100, stable=300, decay=400, min_ratio=0.1
        ),
    },
    "warmup-decay": {
        "warmup: 300, warmup_type: log": WarmupDecay(name="warmup-decay", warmup=300),
        "warmup: 300, warmup_type: linear": WarmupDecay(
            name="warmup-decay", warmup=300, warmup_type="linear"
        ),
    },
}
"""What each plot shows: label -> schedule."""

STYLE = """\
  <style>
    text { font: 12px system-ui, sans-serif; fill: #57606a }
    polyline { fill: none; stroke-width: 2 }
    .axis { stroke: #8c959f; stroke-width: 1 }
    .first { stroke: #0969da } .second { stroke: #bc4c00; stroke-dasharray: 6 4 }
    @media (prefers-color-scheme: dark) {
      text { fill: #9198a1 } .axis { stroke: #656c76 }
      .first { stroke: #4493f8 } .second { stroke: #f0883e }
    }
  </style>"""


def draw(name: str) -> str:
    """One plot as SVG: the share of the peak learning rate over the updates; readable on dark and light."""
    curves = PLOTS[name]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"  <title>{name}: share of the peak learning rate over {STEPS} updates</title>",
        STYLE,
        *_axes(),
        *(
            f'  <polyline class="{style}" points="{_points(schedule)}"/>'
            for style, schedule in zip(("first", "second"), curves.values(), strict=True)
        ),
        *_legend(list(curves)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _x(k: float) -> float:
    return LEFT + (RIGHT - LEFT) * k / STEPS


def _y(share: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * share


def _points(schedule: Schedule) -> str:
    """One point per 5 updates; the last is that after the run."""
    return " ".join(f"{_x(k):.1f},{_y(factor(schedule, k, STEPS)):.1f}" for k in range(0, STEPS + 1, 5))


def _axes() -> list[str]:
    lines = [f'  <polyline class="axis" points="{LEFT},{TOP} {LEFT},{BOTTOM} {RIGHT},{BOTTOM}"/>']
    for share in (0, 0.5, 1):
        lines.append(f'  <text x="{LEFT - 8}" y="{_y(share) + 4:.0f}" text-anchor="end">{share:g}</text>')
    for k in range(0, STEPS + 1, 250):
        lines.append(f'  <text x="{_x(k):.0f}" y="{BOTTOM + 16}" text-anchor="middle">{k}</text>')
    return lines


def _legend(labels: list[str]) -> list[str]:
    """Below the plot: a piece of each line, and what it is."""
    lines, y = [], BOTTOM + 34
    for column, (style, label) in enumerate(zip(("first", "second"), labels, strict=True)):
        x = LEFT if column == 0 else LEFT + 228
        lines.append(f'  <polyline class="{style}" points="{x},{y - 4} {x + 24},{y - 4}"/>')
        lines.append(f'  <text x="{x + 30}" y="{y}">{label}</text>')
    return lines


def main() -> None:
    folder = Path(__file__).parent / "plots"
    folder.mkdir(exist_ok=True)
    for name in PLOTS:
        (folder / f"{name}.svg").write_text(draw(name), encoding="utf-8")


if __name__ == "__main__":
    main()
