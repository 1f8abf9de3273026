"""Charts of what was cut: importance against what was kept, and what the refit could not mend."""

from __future__ import annotations

import altair as alt

from reports.chart import SERIES, Chart, finish, values
from reports.cuts import Cut
from reports.run_folder import Data, Stage, as_dict, as_list, as_number
from reports.words import significant

_MOST_HEADS = 2500
"""Above it a grid of heads would be finer than a screen."""
_MOST_DIMS = 600


def layer_scores(stage: Stage) -> list[float]:
    """How important each of the cut model's layers was, where the stage recorded it."""
    importance = as_dict(stage.selection.get("importance"))
    for name in ("layers", "layer", "depth"):
        scores = [as_number(value) for value in as_list(importance.get(name))]
        if scores and None not in scores:
            return [value for value in scores if value is not None]
    return []


def layers(cut: Cut) -> Chart | None:
    """Importance of each layer of the model that was cut, and which ones stayed."""
    scores = layer_scores(cut.stage)
    if not scores:
        return None
    kept = set(cut.layers)
    rows = [
        {"layer": layer, "importance": value, "state": "kept" if layer in kept else "cut"}
        for layer, value in enumerate(scores)
    ]
    chart = (
        alt.Chart(values(rows))
        .mark_bar(cornerRadiusEnd=2)
        .encode(
            alt.X("layer:O", title=f"{cut.of}'s layer", axis=alt.Axis(labelAngle=0)),
            alt.Y("importance:Q", title="importance (root)", scale=alt.Scale(type="sqrt")),
            alt.Color("state:N", scale=_kept_and_cut(), title=None),
            tooltip=["layer:O", "importance:Q", "state:N"],
        )
    )
    gone = [str(layer) for layer in range(len(scores)) if layer not in kept]
    return finish(
        f"layers{cut.mark}",
        "Layers: importance, and what was kept",
        f"How much each layer changes the residual stream. {len(kept)} of {len(scores)} layers "
        f"were kept; cut: {', '.join(gone) or 'none'}.",
        chart,
        height=180,
    )


def _kept_and_cut() -> alt.Scale:
    return alt.Scale(domain=["kept", "cut"], range=[SERIES[0], "var(--cut)"])


def heads(cut: Cut) -> Chart | None:
    """A grid of the query heads before the cut: large where important, coloured where kept."""
    scores = as_list(as_dict(cut.stage.selection.get("importance")).get("heads"))
    chosen = [as_list(entry) for entry in as_list(cut.stage.selection.get("heads"))]
    kept = dict(zip(cut.layers, chosen, strict=False))
    rows: list[Data] = []
    for layer, of_layer in enumerate(scores):
        for head, score in enumerate(as_list(of_layer)):
            value = as_number(score)
            if value is not None:
                state = "kept" if head in kept.get(layer, ()) else "cut"
                rows.append({"layer": layer, "head": head, "importance": value, "state": state})
    if not rows or len(rows) > _MOST_HEADS:
        return None
    chart = (
        alt.Chart(values(rows))
        .mark_circle(opacity=1)
        .encode(
            alt.X("layer:O", title=f"{cut.of}'s layer", axis=alt.Axis(labelAngle=0)),
            alt.Y("head:O", title="query head"),
            alt.Size("importance:Q", legend=None, scale=alt.Scale(range=[6, 90])),
            alt.Color("state:N", scale=_kept_and_cut(), title=None),
            tooltip=["layer:O", "head:O", "importance:Q", "state:N"],
        )
    )
    stayed = sum(row["state"] == "kept" for row in rows)
    return finish(
        f"heads{cut.mark}",
        "Query heads: importance, and what was kept",
        f"Each point is a head of {cut.of}, larger where it matters more. {stayed:,} of "
        f"{len(rows):,} heads were kept; a layer without a kept head was cut whole.",
        chart,
        height=max(120, 16 * (max(row["head"] for row in rows) + 1) + 20),
    )


def hidden_dims(cut: Cut) -> Chart | None:
    """Hidden dimensions in the order of their importance, and which ones stayed."""
    scores = as_list(as_dict(cut.stage.selection.get("importance")).get("hidden"))
    kept = {n for n in as_list(cut.stage.selection.get("hidden")) if isinstance(n, int)}
    numbers = [(as_number(score), index) for index, score in enumerate(scores)]
    known = sorted(((n, i) for n, i in numbers if n is not None and n > 0), reverse=True)
    if len(known) < 2 or not kept:
        return None
    step = max(1, len(known) // _MOST_DIMS)
    rows = [
        {
            "rank": rank,
            "dimension": index,
            "importance": value,
            "state": "kept" if index in kept else "cut",
        }
        for rank, (value, index) in enumerate(known, start=1)
        if rank % step == 0 or rank <= 2
    ]
    chart = (
        alt.Chart(values(rows))
        .mark_circle(size=36 if len(rows) <= 200 else 12, opacity=1)
        .encode(
            alt.X(
                "rank:Q",
                title="rank by importance",
                scale=alt.Scale(nice=False, padding=6),
                axis=alt.Axis(tickCount=8, grid=False),
            ),
            alt.Y(
                "importance:Q",
                title="importance (log)",
                scale=alt.Scale(type="log", nice=False),
                axis=alt.Axis(tickCount=4),
            ),
            alt.Color("state:N", scale=_kept_and_cut(), title=None),
            tooltip=["dimension:O", "importance:Q", "state:N"],
        )
    )
    first_cut = next((rank for rank, (_, i) in enumerate(known, 1) if i not in kept), None)
    told = f" The most important one that was cut has rank {first_cut:,}." if first_cut else ""
    return finish(
        f"hidden{cut.mark}",
        "Hidden dimensions: importance, and what was kept",
        f"{len(kept & {i for _, i in known}):,} of {len(known):,} dimensions of the residual "
        f"stream were kept.{told}",
        chart,
        height=180,
    )


def neurons(cut: Cut) -> Chart | None:
    """How much of its neurons' importance each layer kept."""
    shares = as_list(as_dict(cut.stage.selection.get("importance")).get("neurons"))
    rows: list[Data] = []
    for layer in cut.layers:
        share = as_number(shares[layer]) if 0 <= layer < len(shares) else None
        if share is not None:
            rows.append({"layer": layer, "share": share})
    if not rows or min(row["share"] for row in rows) >= 1:
        return None
    chart = (
        alt.Chart(values(rows))
        .mark_bar(cornerRadiusEnd=2, color=SERIES[0])
        .encode(
            alt.X("layer:O", title=f"{cut.of}'s layer", axis=alt.Axis(labelAngle=0)),
            alt.Y(
                "share:Q",
                title="importance kept",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(format="%"),
            ),
            tooltip=["layer:O", alt.Tooltip("share:Q", format=".1%")],
        )
    )
    least = min(rows, key=lambda row: row["share"])
    return finish(
        f"neurons{cut.mark}",
        "Neurons: how much of their importance was kept",
        "What a layer's kept neurons are worth, as a share of all of them. The least is "
        f"{least['share']:.0%} (layer {least['layer']}).",
        chart,
        height=160,
    )


_PARTS = ("down proj sliced", "down proj", "o proj sliced", "o proj")
"""Where cutting costs most: errors of plain slicing beside those after the refit."""


def reconstruction(cut: Cut) -> Chart | None:
    """Error of each kept layer's output after the refit, where it was recorded."""
    rows: list[Data] = []
    for place, entry in enumerate(as_list(cut.stage.selection.get("reconstruction"))):
        numbers = as_dict(entry) or {"error": entry}
        layer = as_number(numbers.pop("layer", None))
        layer = place if layer is None else layer
        for name, value in numbers.items():
            error = as_number(value)
            if error is not None and name not in ("teacher_layer", "index"):
                rows.append({"layer": layer, "part": name.replace("_", " "), "error": error})
    if not rows:
        return None
    found = list(dict.fromkeys(row["part"] for row in rows))
    told = [part for part in _PARTS if part in found]
    parts = (told or found)[: len(SERIES)]
    rows = [row for row in rows if row["part"] in parts]
    scale = alt.Scale(domain=parts, range=SERIES[: len(parts)])
    chart = (
        alt.Chart(values(rows))
        .mark_line(point=alt.OverlayMarkDef(size=30, filled=True))
        .encode(
            alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1)),
            alt.Y("error:Q", title="error", scale=alt.Scale(zero=False)),
            alt.Color("part:N", scale=scale, title=None),
            tooltip=["layer:Q", "part:N", "error:Q"],
        )
    )
    worst = max(rows, key=lambda row: row["error"])
    return finish(
        f"reconstruction{cut.mark}",
        "Error of the refit, layer by layer",
        f"How far each layer of the cut model is from {cut.of}'s. The largest is "
        f"{significant(worst['error'])} ({worst['part']}, layer {worst['layer']:g}).",
        chart,
        height=200,
    )
