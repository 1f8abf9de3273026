"""What all charts share: Vega-Lite by altair, with a text for those who can't see them.

Colours are CSS variables of the page, so a chart follows light, dark and print without being drawn
again. Every chart is as wide as its container.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

from reports.run_folder import Data

SERIES = ["var(--series-1)", "var(--series-2)", "var(--series-3)", "var(--series-4)"]
_FONT = "system-ui, sans-serif"  # Vega measures texts on a canvas, which knows no variables
_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": _FONT,
    "view": {"stroke": "transparent"},
    "axis": {
        "labelColor": "var(--soft)",
        "titleColor": "var(--soft)",
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "gridColor": "var(--line)",
        "labelLimit": 140,
    },
    "legend": {
        "labelColor": "var(--ink)",
        "titleColor": "var(--soft)",
        "titleFontWeight": "normal",
        "orient": "top",
        "labelFontSize": 12,
        "symbolStrokeWidth": 2.5,
    },
    "text": {"color": "var(--ink)", "fontSize": 12},
    "rule": {"color": "var(--soft)"},
    "line": {"strokeWidth": 2},
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure of the report."""

    name: str
    title: str
    text: str
    """What the chart shows, in words: its caption."""
    numbers: str
    """Its numbers, for a screen reader; empty where the caption says them all."""
    spec: Data


@functools.cache
def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that needs nothing else (about 900 kB)."""
    names = ("vegaEmbed", "vega", "vegaLite")
    bundle: str = vl_convert.javascript_bundle(";".join(f"window.{n}={n}" for n in names))
    return bundle.replace("\r\n", "\n").replace("\r", "\n")


def finish(
    name: str, title: str, text: str, chart: Any, *, height: int = 260, numbers: str = ""
) -> Chart:
    """An altair chart as a figure as wide as its container."""
    sized = chart.properties(width="container", height=height).configure(**_CONFIG)
    spec = sized.to_dict(validate=False)  # the tests validate
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return Chart(name=name, title=title, text=text, numbers=numbers, spec=spec)


def colours_of(names: Sequence[str]) -> alt.Scale:
    """A colour for each name, in the order of the series; after the last the first again."""
    return alt.Scale(domain=names, range=[SERIES[i % len(SERIES)] for i in range(len(names))])


def values(rows: Sequence[Data]) -> Any:
    """Rows as altair's data."""
    return alt.Data(values=list(rows))
