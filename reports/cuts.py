"""The cuts of a run, each held against the model that it was made from."""

from __future__ import annotations

from dataclasses import dataclass

from reports import words
from reports.run_folder import Run, Stage, as_list, as_number

_AXES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden dimensions",
    "num_attention_heads": "query heads in a layer",
    "num_key_value_heads": "key/value heads in a layer",
    "intermediate_size": "neurons in a layer",
}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A stage that cut something, and the stage whose model it cut."""

    stage: Stage
    before: Stage | None
    number: int
    """From 1, in the order of the run."""

    @property
    def of(self) -> str:
        """Whose layers and heads its numbers count; a corrected teacher is still the teacher."""
        taught = self.before is not None and self.before.kind not in ("teacher", "correct")
        return self.before.name if taught and self.before else "the teacher"

    @property
    def mark(self) -> str:
        """What tells the names of its charts and tables from another cut's."""
        return "" if self.number == 1 else f"-{self.number}"

    @property
    def layers(self) -> list[int]:
        """The layers that stayed."""
        return [n for n in as_list(self.stage.selection.get("layers")) if isinstance(n, int)]


def find_cuts(run: Run) -> list[Cut]:
    """All cuts in order: a recipe may cut, teach and cut again."""
    found: list[Cut] = []
    before = None
    for stage in run.models:
        if before and stage.kind == "teacher":
            continue  # another teacher to learn from, not the one that is cut
        if as_list(stage.selection.get("layers")) or as_list(stage.summary.get("search")):
            found.append(Cut(stage=stage, before=before, number=len(found) + 1))
        before = stage
    return found


def kept(cut: Cut) -> list[tuple[str, str]]:
    """What stayed of the model that was cut, axis by axis."""
    whole = cut.before.config if cut.before else {}
    found = []
    for key, label in _AXES.items():
        before, after = as_number(whole.get(key)), as_number(cut.stage.config.get(key))
        if before and after is not None:
            share = words.percent(after / before)
            found.append((label, f"{after:,.0f} of {before:,.0f} ({share})"))
    if cut.layers:
        found.append(("layers that stayed", _ranges(cut.layers)))
    heads = map(as_list, as_list(cut.stage.selection.get("heads")))
    per_layer = {_ranges(entry) for entry in heads if all(isinstance(h, int) for h in entry)}
    if len(per_layer) == 1:
        found.append(("query heads that stayed, in every layer", per_layer.pop()))
    elif per_layer:
        found.append(("query heads that stayed", f"{len(per_layer)} different sets, by layer"))
    return found


def remarks(cut: Cut) -> list[str]:
    """What the stage noted about its result, and what became of the attention sink."""
    notes = [str(note) for note in as_list(cut.stage.summary.get("notes"))]
    size = as_number(cut.stage.summary.get("sink"))
    left = as_number(cut.stage.summary.get("sink_kept"))
    told_already = any("attention sink" in note for note in notes)
    if size is None or left is None or told_already:
        return notes
    return [
        *notes,
        f"The first position of {cut.of} is {words.significant(size)} times as large as the "
        f"others, an attention sink; the student's is {words.significant(left, 2)} times that.",
    ]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0–2, 5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)
