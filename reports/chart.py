"""What all charts share: Vega-Lite by altair, with a text for those who can't see them.

Colours are CSS variables of the page, so a chart follows light, dark and print without being drawn
again. Every chart is as wide as its container.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt
import vl_convert

from reports.run_folder import Data

SERIES = [f"var(--series-{number})" for number in range(1, 9)]
_SHAPES = ["circle", "square", "triangle-up", "diamond", "cross"]
_DASHES = [[1, 0], [7, 3], [2, 3], [9, 2, 2, 2], [4, 8]]
_LEGEND_LETTERS, _LETTER, _SYMBOL = 34, 7, 34
"""Most letters of a name in a legend, and widths in pixels: of a letter, and of what is before."""
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


def told_apart(
    field: str, names: Sequence[str], *, by: Literal["shape", "strokeDash"], legend: bool = True
) -> dict[str, Any]:
    """What marks of each name look like, as altair's encodings.

    A colour each, in the order of the series; when those are used up the same again with another
    shape (of points) or dash (of lines).
    """
    kind = alt.Shape if by == "shape" else alt.StrokeDash
    more: Sequence[Any] = _SHAPES if by == "shape" else _DASHES
    looks = {"color": (alt.Color, [SERIES[i % len(SERIES)] for i in range(len(names))])}
    if len(names) > len(SERIES):
        looks[by] = (kind, [more[i // len(SERIES) % len(more)] for i in range(len(names))])
    return {
        channel: encoding(
            f"{field}:N",
            scale=alt.Scale(domain=names, range=looks_like),
            title=None,
            legend=_legend(names) if legend else None,
        )
        for channel, (encoding, looks_like) in looks.items()
    }


def _legend(names: Sequence[str]) -> alt.Legend:
    """As many columns as the chart has room for; long names without their middle."""
    longest = min(max(map(len, names), default=0), _LEGEND_LETTERS)
    half = _LEGEND_LETTERS // 2
    return alt.Legend(
        columns={"expr": f"max(1, floor(width / {_SYMBOL + _LETTER * longest}))"},
        labelLimit={"expr": f"max(60, width - {_SYMBOL})"},
        labelExpr=f"length(datum.label) <= {_LEGEND_LETTERS} ? datum.label : "
        f"slice(datum.label, 0, {half}) + '…' + slice(datum.label, -{half - 1})",
    )


def shortened(name: str, most: int = 18) -> str:
    """A name without its middle, where it has more letters."""
    half = most // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-(most - half - 1) :]}"


def values(rows: Sequence[Data]) -> Any:
    """Rows as altair's data."""
    return alt.Data(values=list(rows))
