"""No name writes HTML."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hostile import CLEAN, EXAMPLE, PNG, WPGD, page_of
from sampled import sampled

from wdat import records
from wdat.cli.collect import table
from wdat.errors import SettingError

HOSTILE = "<script>alert(1)</script>\"'&"

TEXTS = ["network", "checkpoint", "data", "split", "attack", "loss", "norm", "device", "commit"]


def test_the_page_of_harmless_records_passes(tmp_path):
    page = page_of([CLEAN, WPGD], tmp_path)
    assert sum(tag == "img" for tag, _ in page.tags) == 1


@pytest.mark.parametrize("name", [HOSTILE, "\"><img src=x onerror='alert(1)'>", "]]></svg><script>alert(1)</script>"])
def test_no_name_writes_html(tmp_path, name):
    changed = dict.fromkeys(TEXTS, name)
    options, versions = {name: name, "steps": name}, {name: name}
    own = replace(WPGD, **changed, options=options, versions=versions)
    page = page_of([replace(CLEAN, **{**changed, "attack": "none"}), own, replace(own, options={"steps": 2})], tmp_path)
    text = "".join(page.words)
    for said in (f"{name} on {name}, 100 {name} images, {name}", f"steps={name}", f"{name} {name}"):
        assert said in text, said


@pytest.mark.parametrize("where", ["attack", "loss", "norm"])
def test_no_name_in_a_figure_writes_html(tmp_path, where):
    """Each alone, so that every figure is drawn."""
    page = page_of([CLEAN, replace(WPGD, **{where: HOSTILE})], tmp_path)
    assert any(tag == "svg" for tag, _ in page.tags)


@pytest.mark.parametrize(
    "picture",
    sampled(["javascript:alert(1)", 3, None, ["x"], "", "../secret.png", "examples/../../secret.png", "/etc/passwd",
     "secret.png", "examples/missing.png", "examples/text.png", "examples/link.png", "examples/deeper/a.png",
     'examples/a.png" onerror="alert(1)'], 3),
)  # fmt: skip
def test_only_png_files_of_the_run_are_embedded(tmp_path, picture):
    (tmp_path / "secret.png").write_bytes(PNG)
    own = tmp_path / "run" / "examples"
    (own / "deeper").mkdir(parents=True)
    (own / "deeper" / "a.png").write_bytes(PNG)
    (own / "text.png").write_bytes(b"<svg onload='alert(1)'/>")
    (own / "link.png").symlink_to(tmp_path / "secret.png")
    (own / "good.png").write_bytes(PNG)
    examples = [
        {**EXAMPLE, "picture": p, "label": HOSTILE, "names": [HOSTILE] * 3} for p in (picture, "examples/good.png")
    ]
    own = replace(WPGD, details={**WPGD.details, "examples": examples, "moved": HOSTILE})
    page = page_of([CLEAN, own], tmp_path / "run")
    assert sum(tag == "img" for tag, _ in page.tags) == 1


@pytest.mark.parametrize("name", [k for k, v in CLEAN.to_json().items() if isinstance(v, (int, float))])
def test_records_with_text_for_numbers_are_refused(tmp_path, name):
    file = tmp_path / "records.json"
    file.write_text(json.dumps([{**CLEAN.to_json(), name: HOSTILE}]))
    with pytest.raises(SettingError, match=r"records\.json isn't a list of records"):
        records.read(file)


@pytest.mark.parametrize(
    "content", ['[{"stage": []}]', "[" * 100_000, "null", '["x"]', "\x80", "cos\nsystem\n(S'ls'\ntR."]
)
def test_other_json_is_refused(tmp_path, content):
    (tmp_path / "records.json").write_text(content)
    with pytest.raises(SettingError, match="move it away"):
        records.read(tmp_path / "records.json")


def test_a_markdown_table_keeps_its_cells():
    named = [replace(WPGD, network=name) for name in ("a|b\n# c <img src=x> [x](javascript:alert(1)) **", "other")]
    (line,) = [line for line in table(named).splitlines() if "alert" in line]
    assert line.startswith(r"| a\|b # c &lt;img src=x> [x\](javascript:alert(1)) \*\* | ")
