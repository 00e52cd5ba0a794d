"""A page in headless Chromium: what its layout measures, and what its console says."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PROBE = """<!DOCTYPE html><body style="margin:0"><iframe style="border:0;width:{width}px;height:2000px" srcdoc="{page}">
</iframe><script>
addEventListener("load", () => {{
  const d = document.querySelector("iframe").contentDocument, all = [...d.querySelectorAll("body *")];
  const inside = e => e.closest(".scroll") || e.closest("svg");
  const box = e => e.getBoundingClientRect();
  document.documentElement.dataset.found = JSON.stringify({{
    client: d.documentElement.clientWidth, scroll: d.documentElement.scrollWidth,
    beyond: all.filter(e => !inside(e) && box(e).right > {width} + 1).map(e => e.tagName),
    figures: [...d.querySelectorAll("figure.plot svg")].map(e => [box(e).width, box(e).height]),
    pictures: [...d.querySelectorAll("img")].filter(e => e.naturalWidth > 0).length,
    texts: [...d.querySelectorAll("figure.plot svg text")].map(e => box(e).height).filter(h => h > 0),
    hidden: [...d.querySelectorAll(".scroll")].map(e => e.scrollWidth - e.clientWidth).filter(w => w > 0),
    tables: [...d.querySelectorAll(".scroll")].map(e => box(e).width),
    dead: [...d.querySelectorAll("nav a")].filter(e => !d.querySelector(e.getAttribute("href"))).length,
    links: d.querySelectorAll("nav a").length,
  }});
}});
</script></body>"""


class Chromium:
    """Opens pages without a window, a network or a profile that outlives the test."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program, self.folder = program, folder

    def _open(self, path: Path, *options: str) -> tuple[str, list[str]]:
        command = [
            self.program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--hide-scrollbars",
            f"--user-data-dir={self.folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=4000",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", *options, path.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    def console(self, page: Path) -> list[str]:
        """What the console says when the file itself is opened."""
        return self._open(page)[1]

    def measure(self, page: str, width: int) -> dict:
        """Layout of the unchanged page in a viewport of a width (a window can't be narrower than 500 pixels)."""
        probe = self.folder / "probe.html"
        probe.write_text(PROBE.format(width=width, page=html.escape(page)), encoding="utf-8")
        dom, _ = self._open(probe, "--window-size=1400,2200")
        return json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))


@pytest.fixture
def chromium(tmp_path) -> Chromium:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return Chromium(program, tmp_path)
