"""The colours of a page, readable on light and on dark: one for each lane, category and phase."""

from __future__ import annotations

from xtrain.report.comparison import Comparison

LANE_COLOURS = (
    *("#3b7ddd", "#e8743b", "#1aa179", "#9a60d6", "#e0487f", "#12a5bd"),
    *("#b58a0e", "#6f8499", "#7cb342", "#8d6e63", "#5c6bc0", "#d81b60"),
)
CATEGORY_COLOURS = {
    "parameters": "#3b7ddd",
    "master": "#7fb0f5",
    "gradients": "#e8743b",
    "optimizer": "#f2b14a",
    "activations": "#1aa179",
    "logits": "#9a60d6",
    "other": "#8d99a8",
}
PHASE_COLOURS = {
    "data": "#12a5bd",
    "forward": "#3b7ddd",
    "backward": "#9a60d6",
    "reduce": "#e0487f",
    "optimizer": "#f2b14a",
    "other": "#8d99a8",
}


def lane_colours(comparison: Comparison) -> dict[str, str]:
    names = [lane.name for lane in comparison.lanes]
    return {name: LANE_COLOURS[number % len(LANE_COLOURS)] for number, name in enumerate(names)}
