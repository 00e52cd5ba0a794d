"""Reports in headless Chromium: nothing in the console, no horizontal scrolling on a phone, figures drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from wdat.cli.collect import write_all
from wdat.records import read
from wdat.reporting.compare import compare
from wdat.reporting.report import render, write_report
from wdat.reporting.runs import find

RESULTS = Path(__file__).parents[2] / "results"
KINDS = {
    "run": lambda: read(RESULTS / "quickstart" / "seed0.json"),
    "evaluation": lambda: read(RESULTS / "evaluate" / "resnet2b_w2_linf.json"),
}


@pytest.fixture(params=["run", "evaluation", "collection", "networks"])
def report(request, tmp_path):
    """The file of a report on committed records."""
    path = tmp_path / "out" / "report.html"
    if request.param in KINDS:
        write_report(KINDS[request.param](), path)
        return path
    folders = ["quickstart"] if request.param == "collection" else ["evaluate"]
    runs = find([RESULTS / folder for folder in folders])
    write_all(compare(runs, baseline="quickstart" if request.param == "collection" else "cnn_a"), runs, path.parent)
    return path


@pytest.mark.long
def test_the_console_is_silent(chromium, report):
    assert chromium.console(report) == []


@pytest.mark.long
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window_and_draws_its_figures(chromium, report, width):
    text = report.read_text(encoding="utf-8")
    found = chromium.measure(text, width)
    assert found["client"] == width
    assert found["scroll"] == width, "nothing but a table scrolls sideways"
    assert found["beyond"] == []
    assert len(found["figures"]) == text.count("<svg") >= 1
    assert all(w > 0.7 * min(width, 500) and h > 100 for w, h in found["figures"])
    assert len(found["texts"]) > 10, "the text of figures is drawn"
    assert min(found["texts"]) >= 8, "and large enough to read"
    assert all(0 < w < width for w in found["tables"])
    if width == 1280:
        assert found["hidden"] == [], "no column needs scrolling on a large screen"
    assert found["dead"] == 0


@pytest.mark.long
def test_long_names_do_not_widen_a_phone(chromium):
    long = "an_exceedingly_long_name_without_a_place_to_break_" * 8
    records = read(RESULTS / "quickstart" / "seed0.json")
    changed = [type(r)(**{**r.__dict__, "network": long, "checkpoint": f"/{long}/best.ckpt"}) for r in records]
    assert chromium.measure(render(changed, f"python train.py model.checkpoint={long}"), 390)["scroll"] == 390


@pytest.mark.long
def test_the_browser_would_notice(chromium, tmp_path):
    """Guards the guards: a page that is too wide, and one that fetches and runs what it may not."""
    good = render(KINDS["evaluation"]())
    wide = good.replace("<main>", '<main><div style="width:700px">x</div>')
    assert chromium.measure(wide, 390)["scroll"] > 390
    bad = tmp_path / "bad.html"
    worse = "<main><script>alert(1)</script><img src='https://example.org/a.png'>"
    bad.write_text(good.replace("<main>", worse), encoding="utf-8")
    assert len(chromium.console(bad)) >= 2
