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
const numbers = (colour) => {
  const parts = colour.match(/[\\d.]+/g).map(Number);
  return colour.startsWith("color(") ? [...parts.slice(0, 3).map((x) => 255 * x), parts[3] ?? 1]
    : [...parts.slice(0, 3), parts[3] ?? 1];
};
const luminance = (rgb) => {
  const [r, g, b] = rgb.slice(0, 3).map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = numbers(getComputedStyle(at).backgroundColor);
    if (colour[3] > 0.99) return colour;
  }
  return [255, 255, 255, 1];
};
// WCAG 2.2, success criterion 1.4.3: 4.5 to 1, and 3 to 1 for large text.
const pale = () => [...document.querySelectorAll("body *")].filter((element) => {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || ["SCRIPT", "STYLE"].includes(element.tagName)) return false;
  if (!element.getClientRects().length || element.classList.contains("skip")) return false;
  const style = getComputedStyle(element);
  const inSvg = element instanceof SVGElement;
  if (inSvg && (style.fill === "none" || style.opacity === "0")) return false;
  const levels = [numbers(inSvg ? style.fill : style.color), behind(element)].map(luminance);
  const ratio = (Math.max(...levels) + 0.05) / (Math.min(...levels) + 0.05);
  const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
  return ratio < (size >= 24 || (bold && size >= 18.66) ? 3 : 4.5);
}).map((element) => `${element.tagName} ${element.textContent.slice(0, 40)}`);
// What axe-core's rules of the same names look at.
const faults = () => {
  const found = [], all = (selector) => [...document.querySelectorAll(selector)];
  const named = (e) => e.textContent.trim() || e.getAttribute("aria-label")
    || e.getAttribute("aria-labelledby");
  if (!document.documentElement.lang) found.push("html-has-lang");
  if (!document.title) found.push("document-title");
  if (all("main").length !== 1) found.push("landmark-one-main");
  const levels = all("h1, h2, h3, h4").map((e) => Number(e.tagName[1]));
  if (levels.some((level, i) => i && level > levels[i - 1] + 1)) found.push("heading-order");
  const ids = all("[id]").map((e) => e.id);
  if (new Set(ids).size !== ids.length) found.push("duplicate-id");
  if (all("button, a, summary").some((e) => !named(e))) found.push("button-name");
  if (all("[role=img]").some((e) => !e.getAttribute("aria-label"))) found.push("role-img-alt");
  if (all("img:not([alt])").length) found.push("image-alt");
  if (all("th:not([scope])").length) found.push("scope-attr-valid");
  if (all("table").some((e) => !e.caption)) found.push("table-caption");
  if (all("[role=region]").some((e) => !named(e))) found.push("region-name");
  for (const e of all("div, pre")) {
    const wide = e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX === "auto";
    if (wide && e.tabIndex < 0) found.push(`scrollable-region-focusable ${e.className}`);
  }
  if (all("dl > *").some((e) => e.tagName !== "DIV")) found.push("definition-list");
  return found;
};
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
      pale: pale(), faults: faults(),
      stages: (() => { const e = document.querySelector("#stages .scroll");
        return e ? e.scrollWidth - e.clientWidth : 0; })(),
      dark: matchMedia("(prefers-color-scheme: dark)").matches,
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


def look(
    chromium: str, report: Path, width: int, tmp_path: Path, *flags: str
) -> tuple[dict[str, Any], str]:
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
    command = [chromium, *FLAGS, *flags, f"--user-data-dir={tmp_path / f'profile-{width}'}"]
    command += [f"--window-size={max(width, 500) + 40},900", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)
    assert said, done.stderr
    return json.loads(html.unescape(said[1])), done.stderr


def console(log: str) -> list[str]:
    """The lines that a page wrote to the console, errors and policy violations among them."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1200, 1440])
def test_the_report_in_a_browser(chromium: str, run: Path, tmp_path: Path, width: int) -> None:
    found, log = look(chromium, write_report(run), width, tmp_path)
    assert console(log) == []
    assert found["width"] == width
    assert found["charts"] == 12
    assert found["blank"] == found["wide"] == 0
    assert found["overflow"] <= 0
    assert found["requests"] == []
    assert found["pale"] == []
    assert found["faults"] == []
    assert width < 1200 or found["stages"] <= 1, "the table of stages fits beside nothing"
    assert found["before"] == ["teacher", "transfer_set", "prune", "distill"]
    assert found["up"] == sorted(found["before"])
    assert found["down"] == sorted(found["before"], reverse=True)
    assert found["sorted"] == "descending"


@pytest.mark.slow
def test_the_report_in_the_dark(chromium: str, run: Path, tmp_path: Path) -> None:
    dark = "--blink-settings=preferredColorScheme=0"
    found, log = look(chromium, write_report(run), 1440, tmp_path, dark)
    assert console(log) == []
    assert found["dark"]
    assert found["pale"] == []


@pytest.mark.slow
def test_the_report_prints(chromium: str, run: Path, tmp_path: Path) -> None:
    """On paper it has some pages, and the charts are on them."""
    pdf = tmp_path / "report.pdf"
    command = [chromium, *(flag for flag in FLAGS if flag != "--dump-dom")]
    command += [f"--user-data-dir={tmp_path / 'print'}", f"--print-to-pdf={pdf}"]
    subprocess.run(
        [*command, write_report(run).as_uri()], capture_output=True, timeout=120, check=True
    )
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))
    assert 2 <= pages <= 20


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
