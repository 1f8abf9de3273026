"""The report in a real browser: drawn, sortable, within the window, silent, and without requests.

Chromium is driven by its command line alone. It loads a page of ours that shows the report in a
frame of the wanted width; a probe at the end of (a copy of) the report posts what it finds to that
page, and Chromium prints the page's DOM.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from reports.page import write_report

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-quic", "--no-first-run", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom",
)  # fmt: skip

PROBE = """
addEventListener("load", () => {
  const places = [...document.querySelectorAll("[data-chart]")];
  const wait = () => {
    if (!places.every((place) => place.dataset.drawn)) return setTimeout(wait, 50);
    const heads = [...document.querySelectorAll("#table-stages thead button")];
    const names = () =>
      [...document.querySelectorAll("#table-stages tbody th")].map((x) => x.firstChild.data);
    const before = names();
    heads[0]?.click();
    const up = names();
    heads[0]?.click();
    const root = document.documentElement;
    const blank = places.filter((place) => !place.querySelector("svg path, svg text"));
    const wide = places.filter((p) => p.querySelector("svg").getBoundingClientRect().right
      > root.clientWidth + 1);
    parent.postMessage({
      charts: places.length, blank: blank.length, wide: wide.length,
      overflow: root.scrollWidth - root.clientWidth, width: innerWidth,
      before, up, down: names(), sorted: heads[0]?.parentNode.getAttribute("aria-sort"),
      requests: performance.getEntriesByType("resource").map((entry) => entry.name)
        .filter((name) => !name.startsWith("data:")),
      attacked: document.querySelectorAll("img, b").length,
    }, "*");
  };
  wait();
});
"""


@pytest.fixture(scope="module")
def chromium() -> str:
    """The browser's command; without one the tests are skipped."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    return found


def with_probe(page: str) -> str:
    """The page with the probe at its end, allowed by its hash in the page's own policy."""
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    policy = html.escape(f"'sha256-{digest}'")
    assert page.count("script-src ") == 1
    page = page.replace("script-src ", f"script-src {policy} ")
    before, end, after = page.rpartition("</body>")
    return f"{before}<script>{PROBE}</script>{end}{after}"


def look(chromium: str, report: Path, width: int, tmp_path: Path) -> tuple[dict[str, Any], str]:
    """What the probe found in the report at this width, and what Chromium logged."""
    copy = tmp_path / f"copy-{width}.html"
    copy.write_text(with_probe(report.read_text(encoding="utf-8")), encoding="utf-8")
    frame = tmp_path / f"frame-{width}.html"
    frame.write_text(
        f'<!doctype html><body><iframe src="{copy.name}" width="{width}" height="800" '
        'style="border:0"></iframe><script>addEventListener("message", (event) => {'
        'document.body.append(document.createElement("pre"));'
        'document.querySelector("pre").textContent = JSON.stringify(event.data); });</script>'
    )
    command = [chromium, *FLAGS, f"--user-data-dir={tmp_path / f'profile-{width}'}"]
    command += [f"--window-size={max(width, 500) + 40},900", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)
    assert said, done.stderr
    return json.loads(html.unescape(said[1])), done.stderr


def console(log: str) -> list[str]:
    """The lines that a page wrote to the console, errors and policy violations among them."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1440])
def test_the_report_in_a_browser(chromium: str, run: Path, tmp_path: Path, width: int) -> None:
    found, log = look(chromium, write_report(run), width, tmp_path)
    assert console(log) == []
    assert found["width"] == width
    assert found["charts"] == 6
    assert found["blank"] == found["wide"] == 0
    assert found["overflow"] <= 0
    assert found["requests"] == []
    assert found["before"] == ["teacher", "transfer_set", "prune", "distill"]
    assert found["up"] == sorted(found["before"])
    assert found["down"] == sorted(found["before"], reverse=True)
    assert found["sorted"] == "descending"


@pytest.mark.slow
def test_hostile_text_stays_text_in_a_browser(
    chromium: str, hostile_run: Path, tmp_path: Path
) -> None:
    found, log = look(chromium, write_report(hostile_run), 360, tmp_path)
    assert console(log) == []
    assert found["attacked"] == 0
    assert found["blank"] == 0
    assert found["overflow"] <= 0
    assert found["requests"] == []


@pytest.mark.slow
def test_the_probe_would_notice(chromium: str, run: Path, tmp_path: Path) -> None:
    """The test's own proof: a wide element, an error and a forbidden script are seen."""
    report = write_report(run)
    page = report.read_text(encoding="utf-8")
    bad = (
        '<div style="width:9000px">x</div><script>alert(1)</script><img src="http://127.0.0.1:9/">'
    )
    report.write_text(page.replace("<main", f"{bad}<main"), encoding="utf-8")
    found, log = look(chromium, report, 360, tmp_path)
    assert found["overflow"] > 0
    assert found["attacked"] == 1
    assert any("Content Security Policy" in line for line in console(log))
