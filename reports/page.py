"""Write a run's report: report.html for people, report.md for a pull request, report.json.

Built from the JSON in the run folder alone, at any time, also while the run is at work or after it
broke. The page is one file that loads nothing: its Content-Security-Policy forbids every request,
and only the page's own scripts, named by their hashes, may run. So even a text that slipped through
the templates' escaping could neither act nor call home.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from reports.chart import javascript
from reports.rivals import rival_data
from reports.run_folder import Run, read_run
from reports.verdict import Judgement, judge
from reports.view import View, make_view
from shearling import __version__, write_json, write_text

SCHEMA = 1
TEMPLATES = Path(__file__).parent / "templates"


def write_report(run: Path, *rivals: Path, out: Path | None = None) -> Path:
    """Write report.html, report.json and report.md into the run folder; returns report.html.

    ``rivals``: folders of other runs to hold this one against. ``out``: another folder to write
    into. A folder that isn't a run is a ShearlingError.
    """
    found = read_run(run)
    others = [read_run(rival) for rival in rivals]
    judgement = judge(found)
    view = make_view(found, judgement, others)
    folder = Path(out or run)
    write_json(folder / "report.json", report_data(found, judgement, view, others))
    write_text(folder / "report.md", render_markdown(view))
    write_text(folder / "report.html", render_html(view))
    return folder / "report.html"


def live_report(run: Path, *, refresh: int) -> str:
    """The page of a run as it is now; while the run is at work it asks again every few seconds."""
    found = read_run(run)
    view = make_view(found, judge(found))
    return render_html(view, refresh=refresh if found.state == "running" else None)


def report_data(
    run: Run, judgement: Judgement, view: View, rivals: Sequence[Run] = ()
) -> dict[str, Any]:
    """The content of report.json. Scorecards stand there without their samples."""
    stages = []
    for stage in run.models:
        card = stage.scorecard
        shown = (
            {key: value for key, value in card.items() if key not in ("samples", "answers")}
            if card
            else None
        )
        stages.append(
            {
                "name": stage.name,
                "kind": stage.kind,
                "state": stage.state,
                "reason": stage.reason,
                "seconds": stage.seconds,
                "peak_memory_bytes": stage.peak_memory_bytes,
                "scorecard": shown,
                "comparisons": [c.to_dict() for c in judgement.comparisons.get(stage.name, [])],
            }
        )
    return {
        "schema": SCHEMA,
        "recipe": run.name,
        "state": run.state,
        "verdict": " ".join([view.verdict, *view.details]),
        "stages": stages,
        "recovered": [vars(entry) for entry in judgement.recoveries],
        "problems": view.problems,
        "versions": {"shearling": __version__},
        "rivals": rival_data(run, rivals),
    }


def _environment(escape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = markdown_cell
    environment.filters["together"] = together
    return environment


def render_html(view: View, *, refresh: int | None = None) -> str:
    """The page; all text of the run goes through autoescaping or `script_json`.

    ``refresh``: seconds after which a browser asks for it again.
    """
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    scripts = [script_text("(function(){" + javascript() + "})();") if view.charts else ""]
    scripts.append(script_text((TEMPLATES / "report.js").read_text(encoding="utf-8")))
    scripts = [script for script in scripts if script]
    page: str = (
        _environment(escape=True)
        .get_template("report.html")
        .render(
            view=view,
            version=__version__,
            style=Markup(style),
            charts=script_json({chart.name: chart.spec for chart in view.charts}),
            scripts=[Markup(script) for script in scripts],
            policy=content_policy(scripts),
            refresh=refresh,
        )
    )
    return page


def render_markdown(view: View) -> str:
    """The same report for a terminal or a pull request, without charts."""
    text: str = _environment(escape=False).get_template("report.md").render(view=view)
    return re.sub(r"\n{3,}", "\n\n", text)


def markdown_cell(text: str) -> str:
    """A text that stays one cell of a table and starts no markup or HTML."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", flat)


def together(text: str) -> str:
    """A sentence in which no line ends between a number and its error or unit."""
    return re.sub(r" (?=±|pp\b|times\b)|(?<=±) ", "\N{NO-BREAK SPACE}", text)


def script_json(data: Any) -> Markup:
    """JSON for a <script type="application/json">: no text in it can close the element."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@functools.cache
def script_text(script: str) -> str:
    """JavaScript that can stand in a <script> element: an HTML parser finds no tag in it."""
    return re.sub(r"<(?=/script|script|!--)", r"\\x3c", script, flags=re.IGNORECASE)


def content_policy(scripts: list[str]) -> str:
    """The page's Content-Security-Policy: these scripts and nothing else."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
