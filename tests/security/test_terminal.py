"""No name steers a terminal, none stops a picture."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
import torch
from hostile import CLEAN, WPGD, page_of
from rich.console import Console
from sampled import sampled

from wdat.cli.console import readable_errors
from wdat.errors import SettingError
from wdat.models import load_network
from wdat.reporting import plots
from wdat.reporting.frame import sections, to_frame
from wdat.reporting.tables import before_after, evaluation_table
from wdat.terminal import PlainConsole

STEERING = "\x1b[2J\x1b]8;;http://x\x07\x9b31m"
ODD = ["[red]x[/red]", "[/]", "[link=http://x]y[/link]", ":bomb:", "\\[x]", f"a{STEERING}b", "a\udcffb", "a\x00b"]


def escapes(text):
    return re.findall(r"\x1b\[[0-9;]*m", text)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("console", [Console, PlainConsole])
def test_tables_show_names_as_they_are(name, console):
    def shown(word):
        changed = dict.fromkeys(("network", "data", "split", "attack", "loss", "norm"), word)
        one, two = replace(CLEAN, network=word, data=word, loss=word), replace(WPGD, **changed)
        out = console(file=io.StringIO(), force_terminal=True, width=400, legacy_windows=False, highlight=False)
        out.print(evaluation_table([one, two]))
        both = [replace(r, stage=stage, split="test") for stage in ("before", "after") for r in (one, two)]
        out.print(before_after(both, [word], 0.04))
        return out.file.getvalue()

    text, plain = shown(name), shown("plain")
    assert sorted(set(escapes(text))) == sorted(set(escapes(plain))), "no colours of its own"
    assert not set("\x07\x9b\x00\udcff") & set(text)
    assert "\x1b[2J" not in text
    assert "\x1b]" not in text
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    assert text.count(safe) == plain.count("plain")


@pytest.mark.parametrize("name", ODD)
def test_lines_and_errors_are_shown_as_they_are(name, capsys):
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    out = PlainConsole(file=io.StringIO(), force_terminal=True)
    out.print(f"{name}: {name} " + 50 * "long ")
    assert out.file.getvalue() == f"{safe}: {safe} " + 50 * "long " + "\n"
    with pytest.raises(SystemExit), readable_errors():
        raise SettingError(f"data.path={name}: no such file")
    assert capsys.readouterr().err == f"error: data.path={safe}: no such file\n"


def test_a_key_of_a_file_steers_nothing(tmp_path, capsys):
    torch.save({f"{STEERING}.weight": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(SystemExit), readable_errors():
        load_network("small_cnn", checkpoint=tmp_path / "x.pt")
    assert "\x1b" not in capsys.readouterr().err


NAMES = ["$\\frac$", "$\\frac", "\\", "_hidden", f"a{STEERING}b\x00\udcff", "用户", "x" * 5000, "\n" * 50]


@pytest.mark.parametrize("name", sampled(NAMES, 3), ids=lambda name: repr(name[:9]))
def test_no_name_stops_a_picture(tmp_path, name):
    """Warnings are errors here: a name that is taken for mathematics, for a glyph, or for the room of the axes."""
    changed = dict.fromkeys(("network", "data", "attack", "loss", "norm"), name)
    found = [replace(CLEAN, **{**changed, "attack": "none"}), replace(WPGD, **changed)]
    both = [replace(r, stage=stage) for stage in ("before", "after") for r in found]
    plots.accuracy_against_budget(both, tmp_path / "curve.png")
    plots.save(plots.accuracy_curves(sections(to_frame(found))[0]), tmp_path / "curve.svg")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert "\x1b" not in (tmp_path / "curve.svg").read_text(encoding="utf-8")


def test_a_page_of_odd_names_can_be_written(tmp_path):
    odd = "a\udcffb" + "x" * 5000
    page_of([replace(CLEAN, network=odd, data=odd, device=odd)], tmp_path)
