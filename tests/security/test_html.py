"""No name writes HTML."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import pytest
from hostile import CLEAN, EXAMPLE, PNG, WPGD, page_of

from wdat import records
from wdat.cli.collect import table
from wdat.errors import SettingError

HOSTILE = "<script>alert(1)</script>\"'&"

TEXTS = ["network", "checkpoint", "data", "split", "attack", "loss", "norm", "device", "commit"]


def test_the_page_of_harmless_records_passes(tmp_path):
    page = page_of([CLEAN, WPGD], tmp_path)
    assert sum(tag == "img" for tag, _ in page.tags) == 3


@pytest.mark.parametrize("name", [HOSTILE, "\"><img src=x onerror='alert(1)'>", "]]></svg><script>alert(1)</script>"])
def test_no_name_writes_html(tmp_path, name):
    changed = dict.fromkeys(TEXTS, name)
    options, versions = {name: name, "steps": name}, {name: name}
    own = replace(WPGD, **changed, options=options, versions=versions)
    page = page_of([replace(CLEAN, **{**changed, "attack": "none"}), own, replace(own, options={"steps": 2})], tmp_path)
    text = "".join(page.words)
    for said in (f"{name}, {name} {name}, 100 images, {name}", f"steps={name}", f"{name} {name}"):
        assert said in text, said


@pytest.mark.parametrize("where", ["attack", "loss", "norm"])
def test_no_name_in_a_figure_writes_html(tmp_path, where):
    """Each alone, so that every figure is drawn."""
    page = page_of([CLEAN, replace(WPGD, **{where: HOSTILE})], tmp_path)
    assert any(tag == "svg" for tag, _ in page.tags)


@pytest.mark.parametrize(
    "picture",
    [f'{PNG}"><script>alert(1)</script>', f'{PNG}" onerror="alert(1)', "javascript:alert(1)", 3, None, ["x"], "",
     "AAAA", f"{PNG}\n", PNG[:-3], base64.b64encode(b"<svg onload='alert(1)'/>").decode()],
)  # fmt: skip
def test_only_pictures_are_embedded(tmp_path, picture):
    example = {**EXAMPLE, "image": picture, "label": HOSTILE, "prediction": HOSTILE}
    page = page_of([CLEAN, replace(WPGD, details={**WPGD.details, "examples": [example], "moved": HOSTILE})], tmp_path)
    assert sum(tag == "img" for tag, _ in page.tags) == 2


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
    line = table([replace(WPGD, network="a|b\n# c <img src=x> [x](javascript:alert(1))")]).splitlines()[2]
    assert line.startswith(r"| a\|b # c &lt;img src=x> [x]\(javascript:alert(1)) | digits test | wpgd ce, W_2 | ")
