"""The report in a real browser: Debian's Chromium, driven by playwright, judged by axe-core.

Drawn, sortable, within the window, readable in light and dark, usable by keyboard, silent on the
console, and without a request to anywhere.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipelines import serve
from pipelines.serve import make_server
from reports.liveness import process_identity
from reports.page import write_report

pytest.importorskip("playwright", reason="the extra `dev` brings it")
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Error, Page, sync_playwright

pytestmark = pytest.mark.slow

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic",
    "--no-first-run", "--disable-component-update", "--disable-sync",
]  # fmt: skip
CHARTS = 14
DRAWN = "[...document.querySelectorAll('[data-chart]')].every((place) => place.dataset.drawn)"

# Charts are hidden from screen readers, which read their texts, so axe passes over them.
# WCAG 2.2, success criterion 1.4.3: 4.5 to 1 between a text and what is behind it.
PALE = """() => {
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
  return [...document.querySelectorAll("svg text")].filter((element) => {
    const style = getComputedStyle(element);
    if (!element.textContent.trim() || style.fill === "none" || style.opacity === "0") return false;
    const levels = [numbers(style.fill), behind(element)].map(luminance);
    return (Math.max(...levels) + 0.05) / (Math.min(...levels) + 0.05) < 4.5;
  }).map((element) => element.textContent);
}"""


@dataclass
class Seen:
    """A page, and all that it said and asked for while it was open."""

    page: Page
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def number(self, expression: str) -> float:
        return float(self.page.evaluate(expression))

    def axe(self) -> list[str]:
        """What axe-core finds wrong: its rule, and the first element that breaks it."""
        found = Axe().run(self.page).response["violations"]
        return [f"{rule['id']}: {rule['nodes'][0]['html']}" for rule in found]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser of this machine; without one the tests are skipped."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


def wait_until(page: Page, expression: str, seconds: float = 60.0) -> None:
    """Ask again and again; playwright's own way of waiting is what the page's policy forbids."""
    end = time.monotonic() + seconds
    while True:
        try:
            if page.evaluate(expression):
                return
        except Error:  # the page is being loaded anew
            pass
        assert time.monotonic() < end, f"never came true: {expression}"
        page.wait_for_timeout(50)


def look(
    chromium: Browser, address: Path | str, width: int = 1440, *, scheme: str = "light"
) -> Seen:
    """Open a page in a fresh profile and wait until it is drawn."""
    context = chromium.new_context(
        viewport={"width": width, "height": 800}, color_scheme="dark" if scheme == "dark" else None
    )
    page = context.new_page()
    page.set_default_timeout(120_000)  # a busy machine is slow, not wrong
    seen = Seen(page)
    seen.page.on("console", lambda message: seen.console.append(message.text))
    seen.page.on("pageerror", lambda error: seen.console.append(str(error)))
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    seen.page.goto(address.as_uri() if isinstance(address, Path) else address)
    wait_until(seen.page, DRAWN)
    return seen


OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
WIDE = (
    "[...document.querySelectorAll('[data-chart] > svg, [data-chart] svg')].filter((svg) =>"
    " svg.getBoundingClientRect().right > document.documentElement.clientWidth + 1).length"
)
BLANK = (
    "[...document.querySelectorAll('[data-chart]')]"
    ".filter((place) => !place.querySelector('svg path')).length"
)


@pytest.mark.parametrize(
    ("width", "scheme"), [(360, "light"), (360, "dark"), (1440, "light"), (1440, "dark")]
)
def test_the_report_in_a_browser(chromium: Browser, run: Path, width: int, scheme: str) -> None:
    report = write_report(run)
    seen = look(chromium, report, width, scheme=scheme)
    assert seen.number("document.querySelectorAll('[data-chart]').length") == CHARTS
    assert seen.number(BLANK) == seen.number(WIDE) == 0
    assert seen.number(OVERFLOW) <= 0
    assert seen.page.evaluate(PALE) == []
    assert seen.axe() == []
    assert seen.console == []
    assert seen.requests == [report.as_uri()]
    dark = seen.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark == (scheme == "dark")


BACKWARDS = """() => [...document.querySelectorAll(".role-axis")].filter((axis) => {
  const labels = [...axis.querySelectorAll(".role-axis-label text")]
    .map((e) => [e.getBoundingClientRect(), parseFloat(e.textContent.replace(/,/g, ""))])
    .filter(([, number]) => !Number.isNaN(number)).sort(([a], [b]) => a.left - b.left);
  const lies = labels.length > 1 && Math.abs(labels[0][0].top - labels[1][0].top) < 2;
  return lies && labels[0][1] > labels.at(-1)[1];
}).length"""
CUT_OFF = """() => [...document.querySelectorAll("[data-chart] svg")].filter((svg) => {
  const edge = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].some((text) => {
    const place = text.getBoundingClientRect();
    return place.right > edge.right + 1 || place.left < edge.left - 1;
  });
}).length"""


@pytest.mark.parametrize("width", [390, 1200])
def test_twenty_models_with_long_names_fit_their_charts(
    chromium: Browser, crowded_run: Path, width: int
) -> None:
    seen = look(chromium, write_report(crowded_run), width)
    assert seen.number(OVERFLOW) <= 0
    assert seen.page.evaluate(BACKWARDS) == seen.page.evaluate(CUT_OFF) == 0


def test_the_tables_of_a_whole_run_fit_a_desk(chromium: Browser, run: Path) -> None:
    seen = look(chromium, write_report(run), 1200)
    fits = "(e) => e.scrollWidth - e.clientWidth"
    assert seen.page.locator("#stages .scroll").evaluate(fits) <= 1


def column(page: Page, table: str, number: int) -> list[str]:
    cells = page.locator(f"#{table} tbody tr > :nth-child({number})")
    return [str(key) for key in cells.evaluate_all("(all) => all.map((e) => e.dataset.sort)")]


def test_tables_are_sorted_by_mouse_and_keyboard(chromium: Browser, run: Path) -> None:
    page = look(chromium, write_report(run)).page
    heads = page.locator("#table-stages thead th")
    assert column(page, "table-stages", 1) == ["teacher", "transfer_set", "prune", "distill"]
    heads.nth(0).get_by_role("button").click()
    assert column(page, "table-stages", 1) == ["distill", "prune", "teacher", "transfer_set"]
    assert heads.nth(0).get_attribute("aria-sort") == "ascending"
    heads.nth(1).get_by_role("button").press("Enter")
    assert heads.nth(0).get_attribute("aria-sort") is None
    numbers = [float(key) for key in column(page, "table-stages", 2)]
    assert numbers == sorted(numbers)
    assert numbers[0] == float("-inf"), "what has no number comes first"
    heads.nth(1).get_by_role("button").press("Space")
    assert [float(key) for key in column(page, "table-stages", 2)] == numbers[::-1]
    assert heads.nth(1).get_attribute("aria-sort") == "descending"
    for name in ("table-answers", "table-tasks", "table-metrics"):
        page.locator("details:has(#table-metrics)").evaluate("(e) => { e.open = true; }")
        page.locator(f"#{name} thead th").nth(0).get_by_role("button").click()
        rows = column(page, name, 1)
        assert rows == sorted(rows, key=str.casefold), name


def test_all_can_be_reached_by_keyboard_and_is_seen_there(chromium: Browser, run: Path) -> None:
    page = look(chromium, write_report(run)).page
    page.keyboard.press("Tab")
    first = page.evaluate("document.activeElement.className")
    assert first == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    reached, unseen = set[str](), []
    for _ in range(400):
        tag, outlined, text = page.evaluate(
            "(() => { const e = document.activeElement; return [e.tagName, "
            "getComputedStyle(e).outlineStyle !== 'none', e.textContent.slice(0, 30)]; })()"
        )
        if tag == "BODY":
            break
        reached.add(tag)
        if not outlined:
            unseen.append(f"{tag} {text}")
        page.keyboard.press("Tab")
    assert unseen == []
    assert {"A", "BUTTON", "SUMMARY", "DIV", "PRE"} <= reached
    page.locator("nav a").last.press("Enter")
    assert page.evaluate("location.hash") == "#again"


def test_a_screen_reader_gets_the_charts_in_words(chromium: Browser, run: Path) -> None:
    page = look(chromium, write_report(run)).page
    images = page.get_by_role("img")
    assert images.count() == CHARTS
    names = images.evaluate_all("(all) => all.map((e) => e.getAttribute('aria-label'))")
    assert all(re.search(r"\d", name) for name in names), names
    tree = page.locator("main").aria_snapshot()
    assert 'table "What each stage made' in tree
    assert 'rowheader "teacher' in tree
    assert 'navigation "Contents"' in tree


def test_the_report_prints(chromium: Browser, run: Path) -> None:
    """On paper: some pages, nothing cut off at the right, nothing folded away."""
    seen = look(chromium, write_report(run), 700)  # A4 less its margins
    pages = len(re.findall(rb"/Type\s*/Page\b", seen.page.pdf(format="A4")))
    assert 2 <= pages <= 20
    seen.page.emulate_media(media="print")
    seen.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert seen.number(OVERFLOW) <= 1
    assert seen.number("document.querySelectorAll('details:not([open])').length") == 0
    assert seen.console == []


def test_hostile_text_stays_text_in_a_browser(chromium: Browser, hostile_run: Path) -> None:
    report = write_report(hostile_run)
    seen = look(chromium, report, 360)
    assert seen.console == []
    assert seen.number("document.querySelectorAll('img, b').length") == 0
    assert seen.number(BLANK) == 0
    assert seen.number(OVERFLOW) <= 0
    assert seen.requests == [report.as_uri()]


def test_a_served_report_follows_the_run(
    chromium: Browser, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page of a run at work asks again by itself, and stops when the run is done."""
    monkeypatch.setattr(serve, "SECONDS_BETWEEN", 1)
    journal: dict[str, Any] = json.loads((run / "run.json").read_text())
    (run / "run.lock").write_text(json.dumps(process_identity()))
    (run / "run.json").write_text(json.dumps({**journal, "state": "running"}))
    with make_server(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        home = f"http://127.0.0.1:{server.server_port}/"
        seen = look(chromium, home)
        assert "still at work" in seen.page.inner_text("main")
        (run / "run.json").write_text(json.dumps({**journal, "state": "done"}))
        (run / "run.lock").unlink()
        wait_until(seen.page, "!document.body.innerText.includes('still at work')")
        wait_until(seen.page, DRAWN)
        asked = len(seen.requests)
        seen.page.wait_for_timeout(1500)
        server.shutdown()
    assert set(seen.requests) == {home}
    assert len(seen.requests) == asked, "a finished run is not asked for again"
    assert seen.console == []


def test_the_probes_would_notice(chromium: Browser, run: Path) -> None:
    """The tests' own proof: width, a forbidden script, a request and a lack of names are seen."""
    report = write_report(run)
    bad = (
        '<div style="width:9000px">x</div><script>alert(1)</script><img src="http://127.0.0.1:9/">'
        '<p style="color:#ddd">pale</p><svg><text style="fill:#eee">pale</text></svg>'
    )
    page = report.read_text(encoding="utf-8").replace("<main", f"{bad}<main")
    report.write_text(page, encoding="utf-8")
    seen = look(chromium, report, 360)
    assert seen.number(OVERFLOW) > 0
    assert any("Content Security Policy" in line for line in seen.console)
    rules = " ".join(seen.axe())
    assert "image-alt" in rules
    assert "color-contrast" in rules
    assert seen.page.evaluate(PALE) == ["pale"]
