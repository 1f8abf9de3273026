"""What a report tells of a transfer set's text: what was cleaned away and why, how long it is.

Reads transfer_set.json as anything may stand there; texts in it are other people's.
"""

from __future__ import annotations

from reports import words
from reports.run_folder import Data, as_dict, as_list, as_number
from reports.tables import Cell, Table

_REASONS = 3
_NAMES = {"languages": "language", "gopher": "Gopher's rules", "c4": "C4's rules",
          "fineweb": "FineWeb's rules", "benchmarks": "benchmarks' questions"}  # fmt: skip


def cleaning_tables(transfer: Data) -> list[Table]:
    """The tables about a transfer set's text, those that there is something for."""
    cleaning = as_dict(transfer.get("cleaning"))
    names = [str(as_dict(source).get("name") or "") for source in as_list(transfer.get("sources"))]
    made = [
        _filters(cleaning),
        _overlap(cleaning),
        _samples(cleaning, names),
        _counts(
            "languages",
            "Languages, in documents.",
            "language",
            as_dict(cleaning.get("languages_before")),
            as_dict(cleaning.get("languages_after")),
        ),
        _lengths(cleaning, transfer),
    ]
    return [table for table in made if table is not None]


def _number(value: float | None, note: str = "") -> Cell:
    if value is None:
        return Cell(text=words.MISSING, sort=float("-inf"))
    return Cell(text=f"{value:,.0f}", note=note, sort=value)


def _name(entry: Data) -> str:
    name = str(entry.get("name") or "filter")
    return _NAMES.get(name, name)


def _filters(cleaning: Data) -> Table | None:
    """One row a filter, in the order in which the text went through them."""
    rows = []
    for entry in map(as_dict, as_list(cleaning.get("filters"))):
        documents, tokens = (as_number(entry.get(f"{of}_before")) for of in ("documents", "tokens"))
        gone, lost = (as_number(entry.get(f"{of}_removed")) for of in ("documents", "tokens"))
        reasons = sorted(
            (
                (as_number(count) or 0, str(why))
                for why, count in as_dict(entry.get("reasons")).items()
            ),
            reverse=True,
        )
        why = ", ".join(f"{reason} {count:,.0f}" for count, reason in reasons[:_REASONS])
        rows.append(
            [
                Cell(text=_name(entry), note=why, sort=_name(entry)),
                _number(documents),
                _number(gone, words.percent(words.ratio(gone, documents), 1)),
                _number(tokens),
                _number(lost, words.percent(words.ratio(lost, tokens), 1)),
            ]
        )
    if not rows:
        return None
    lines = as_number(cleaning.get("tokens_in_removed_lines"))
    after = [as_number(cleaning.get(f"{of}_after")) for of in ("documents", "tokens")]
    rows.append(
        [
            Cell(text="left", note=f"{lines:,.0f} tokens in single lines gone" if lines else ""),
            *(cell for number in after for cell in (_number(number), Cell(text=""))),
        ]
    )
    return Table(
        name="cleaning",
        caption="Cleaning: what each filter was given and took out.",
        columns=["filter", "documents", "removed", "tokens", "removed"],
        rows=rows,
    )


def _overlap(cleaning: Data) -> Table | None:
    found = as_dict(cleaning.get("benchmarks"))
    unread = as_dict(cleaning.get("benchmarks_not_read"))
    if not found and not unread:
        return None
    rows = [
        [Cell(text=str(task), sort=str(task)), _number(as_number(n))] for task, n in found.items()
    ]
    rows += [
        [
            Cell(text=str(task), sort=str(task)),
            Cell(text="not looked for", note=str(why), sort=-1.0),
        ]
        for task, why in unread.items()
    ]
    return Table(
        name="overlap",
        caption="Overlap with the benchmarks: documents removed because they share 13 words in a "
        "row with a task's question. One document may count for several tasks.",
        columns=["task", "documents"],
        rows=rows,
    )


def _samples(cleaning: Data, names: list[str]) -> Table | None:
    """Examples of what was removed, each cut to a line."""
    rows = []
    for entry in map(as_dict, as_list(cleaning.get("filters"))):
        for sample in map(as_dict, as_list(entry.get("samples"))):
            source = sample.get("source")
            known = isinstance(source, int) and 0 <= source < len(names)
            rows.append(
                [
                    Cell(text=_name(entry), note=str(sample.get("reason") or "")),
                    Cell(text=names[source] if known and isinstance(source, int) else ""),
                    Cell(text=" ".join(str(sample.get("text") or "").split())[:240]),
                ]
            )
    if not rows:
        return None
    return Table(
        name="removed",
        caption="Examples of what was removed.",
        columns=["filter", "source", "how it begins"],
        rows=rows,
        kind="texts",
    )


def _counts(name: str, caption: str, what: str, before: Data, after: Data) -> Table | None:
    if not before and not after:
        return None
    rows = []
    for key in dict.fromkeys([*before, *after]):
        counts = [as_number(before.get(key)) or 0, as_number(after.get(key)) or 0]
        rows.append([Cell(text=str(key), sort=str(key)), *map(_number, counts)])
    return Table(name=name, caption=caption, columns=[what, "before", "after"], rows=rows)


def _lengths(cleaning: Data, transfer: Data) -> Table | None:
    after = as_dict(transfer.get("lengths"))
    before = as_dict(cleaning.get("lengths_before")) or after
    bounds = sorted(
        {int(key) for key in [*before, *after] if str(key).isdecimal() and len(key) < 16}
    )
    if not bounds:
        return None
    rows = [
        [
            Cell(text=f"{bound:,} to {2 * bound - 1:,}", sort=bound),
            _number(as_number(before.get(str(bound))) or 0),
            _number(as_number(after.get(str(bound))) or 0),
        ]
        for bound in bounds
    ]
    return Table(
        name="lengths",
        caption="Lengths of documents, as they were read and as they are in the set.",
        columns=["tokens", "read", "in the set"],
        rows=rows,
    )
