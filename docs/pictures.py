"""The README's pictures of a report: on a desk, on a phone, in the dark. Needs chromium.

    python docs/pictures.py runs/quickstart

A headless Chromium has no window as narrow as a phone, so there the report stands in a frame.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--no-first-run", "--hide-scrollbars", "--virtual-time-budget=10000",
)  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"
LIGHT = "--blink-settings=preferredColorScheme=1"
PHONE = """<!doctype html><style>
body {{ margin: 0; height: 100vh; display: grid; place-items: center; background: #d9d4c8; }}
iframe {{ width: 390px; height: 844px; border: 6px solid #23211d; border-radius: 26px; }}
</style><iframe src="{report}"></iframe>"""


def picture(page: str, out: Path, size: tuple[int, int], *more: str) -> None:
    """A screenshot of the top of a page, written to ``out``."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        sys.exit("chromium is not installed; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", f"--screenshot={out}"]
        command += [f"--window-size={size[0]},{size[1]}", *more, page]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    print(out)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python docs/pictures.py RUN [FOLDER FOR THE PICTURES]")
    report = (Path(sys.argv[1]) / "report.html").resolve()
    out = Path(sys.argv[2] if len(sys.argv) == 3 else Path(__file__).parent).resolve()
    if not report.is_file():
        sys.exit(f"{report} is not there; make it with: shearling report {sys.argv[1]}")
    picture(report.as_uri(), out / "report.png", (1200, 1500), LIGHT)
    picture(report.as_uri(), out / "report-dark.png", (1200, 1500), DARK)
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "phone.html"
        frame.write_text(PHONE.format(report=report.as_uri()), encoding="utf-8")
        picture(frame.as_uri(), out / "report-phone.png", (520, 920), LIGHT)


if __name__ == "__main__":
    main()
