"""Records, in and out of JSON."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import pytest

from wdat import records
from wdat.errors import SettingError
from wdat.records import Record, RecordFile, budget_name, read, write


def _record(**changes):
    values = {
        "stage": "evaluate",
        "network": "n",
        "checkpoint": "",
        "data": "digits",
        "split": "test",
        "attack": "wpgd",
        "options": {"steps": 5, "radii_loss": None},
        "loss": "ce",
        "p": 2.0,
        "norm": "linf",
        "delta": 8 / 255,
        "n": 10,
        "set_size": 10,
        "accuracy": 0.5,
        "accuracy_low": 0.2,
        "accuracy_high": 0.8,
        "loss_mean": 1.5,
        "distance": 0.03,
        "seconds": 1.0,
        "seed": 0,
        "device": "cpu",
    }
    return Record(**{**values, **changes})


@pytest.mark.parametrize("p", [2.0, math.inf, 1.0])
def test_a_record_survives_a_file(tmp_path, p):
    record = _record(p=p, upsilon=3.0, epoch=4, dropped=1)
    write(tmp_path / "new" / "records.json", [record])
    assert read(tmp_path / "new" / "records.json") == [record]


def test_infinite_p_is_the_text_inf_and_the_file_is_strict_json(tmp_path):
    write(tmp_path / "r.json", [_record(p=math.inf)])

    def refuse(constant):
        raise AssertionError(constant)

    (values,) = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert values["p"] == "inf"
    assert values["delta"] == 8 / 255


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_figures_that_are_not_finite_are_null(bad, tmp_path):
    record = _record(loss_mean=bad, upsilon=bad, options={"a": bad, "deep": {"b": bad}})
    write(tmp_path / "r.json", [record])
    (values,) = json.loads((tmp_path / "r.json").read_text())
    assert values["loss_mean"] is None
    assert values["upsilon"] is None
    assert values["options"] == {"a": None, "deep": {"b": None}}
    assert read(tmp_path / "r.json")[0].loss_mean is None


def test_figures_in_lists_that_are_not_finite_are_null_too(tmp_path):
    write(tmp_path / "r.json", [_record(options={"radii": [math.inf, 1.0], "pair": (math.nan,)})])
    (values,) = json.loads((tmp_path / "r.json").read_text())
    assert values["options"] == {"radii": [None, 1.0], "pair": [None]}


def test_a_record_states_its_source():
    record = _record()
    assert {"python", "torch"} <= set(record.versions)
    assert record.commit is None or len(record.commit.rstrip("+")) == 12


def test_keys_of_a_newer_version_are_left_out():
    assert Record.from_json({**_record().to_json(), "colour": "red"}) == _record()


@pytest.mark.parametrize("stage", ["serialising", "renaming"])
def test_a_failure_while_writing_leaves_the_older_file(tmp_path, monkeypatch, stage):
    path = tmp_path / "records.json"
    write(path, [_record()])
    older = path.read_bytes()

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(*((records.json, "dumps") if stage == "serialising" else (os, "replace")), fail)
    with pytest.raises(OSError, match="no space"):
        write(path, [_record(), _record()])
    monkeypatch.undo()
    assert path.read_bytes() == older


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "3", "[1]", '["a"]', '{"a": 1}', "{}", "[{}]", '[{"p": null}]', '[{"p": 2}]', '[{"p": "x"}]'],
)
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "records.json"
    path.write_text(text)
    with pytest.raises(SettingError, match=r"records\.json"):
        read(path)


def test_a_file_cut_short_is_named(tmp_path):
    path = tmp_path / "records.json"
    write(path, [_record()])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SettingError, match=r"records\.json"):
        RecordFile(path)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "records.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingError, match=r"records\.json"):
        read(path)


def test_a_book_writes_through_and_goes_on(tmp_path):
    path = tmp_path / "run" / "records.json"
    results = RecordFile(path)
    assert results.records == []
    results.add([_record(stage="before")])
    results.add([_record(stage="epoch", epoch=1), _record(stage="epoch", epoch=2)])
    again = RecordFile(path)
    again.add([_record(stage="after")])
    assert [r.stage for r in read(path)] == ["before", "epoch", "epoch", "after"]
    assert again.records == read(path)
    assert [f.name for f in path.parent.iterdir()] == ["records.json"]


def test_a_book_without_a_file_keeps_records_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = RecordFile(None)
    results.add([_record()])
    assert results.records == [replace(_record())]
    assert list(tmp_path.iterdir()) == []


PNG = b"\x89PNG\r\n\x1a\n"


def test_pictures_become_files_beside_the_records(tmp_path):
    examples = [{"picture": PNG + bytes([i]), "label": i} for i in range(2)]
    results = RecordFile(tmp_path / "run" / "records.json")
    results.add([_record(details={"examples": examples, "moved": 3}), _record(seed=1, details={"examples": examples})])
    assert results.records == read(results.path)
    names = [e["picture"] for r in results.records for e in r.details["examples"]]
    assert len(set(names)) == 4
    assert all((results.path.parent / name).read_bytes().startswith(PNG) for name in names)
    assert (results.path.parent / names[1]).read_bytes() == PNG + b"\x01"
    assert results.path.stat().st_size < 4000
    results.add([_record(seed=1, details={"examples": examples})])
    assert len(list((tmp_path / "run" / "examples").iterdir())) == 4, "measured once more, replaced"


def test_names_of_pictures_hold_no_path(tmp_path):
    record = _record(attack="../../x/é", loss="a\\b", details={"examples": [{"picture": PNG}]})
    (kept,) = write(tmp_path / "run" / "records.json", [record])
    assert [f.name for f in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / kept.details["examples"][0]["picture"]).parent == tmp_path / "run" / "examples"


SAME = {
    "options": {"steps": 5, "radii_loss": None, "batch_size": 7},
    "seconds": 9.0,
    "accuracy": 0.1,
    "device": "cuda:0",
}


@pytest.mark.parametrize("change", [SAME, {"delta": 8 / 255 * (1 + 1e-12)}, {"versions": {}}, {"commit": "x"}])
def test_two_measurements_of_the_same_thing_have_one_key(change):
    assert _record(**change).key == _record().key


@pytest.mark.parametrize(
    "change",
    [{"stage": "after"}, {"epoch": 1}, {"network": "m"}, {"checkpoint": "c"}, {"weights": "w"}, {"data": "x"},
     {"split": "val"}, {"images": "i"}, {"n": 9}, {"seed": 1}, {"attack": "pgd"}, {"options": {"steps": 6}},
     {"loss": "redlr"}, {"p": math.inf}, {"norm": "l2"}, {"delta": 0.1}],
)  # fmt: skip
def test_whatever_else_differs_is_another_measurement(change):
    assert _record(**change).key != _record().key


def test_the_runs_seed_among_the_options_says_nothing_more():
    options = {"steps": 5, "radii_loss": None, "seed": 0}
    assert _record(options=options).key == _record().key
    assert _record(options={**options, "seed": 3}).key != _record().key


def test_an_epoch_that_is_trained_anew_replaces_its_records(tmp_path):
    results = RecordFile(tmp_path / "records.json")
    results.add([_record(stage="epoch", epoch=e, accuracy=0.1 * e, weights=f"w{e}") for e in (1, 2)])
    results.add([_record(stage="epoch", epoch=2, accuracy=0.9, weights="other")])
    assert [(r.epoch, r.accuracy) for r in read(tmp_path / "records.json")] == [(1, 0.1), (2, 0.9)]


@pytest.mark.parametrize("k", [0.25, 0.5, 1, 2, 4, 8, 16, 10, 100])
def test_a_linf_budget_that_was_typed_as_a_fraction_of_255_is_written_so(k):
    assert budget_name(k / 255, "linf") == f"{k}/255"
    assert "255" not in budget_name(k / 255, "l2")


def test_budgets_that_were_typed_as_decimals_stay_so():
    assert [budget_name(d, norm) for d in (0.05, 0.1, 0.25, 1.0) for norm in ("linf", "l2")] == [
        "0.05", "0.05", "0.1", "0.1", "0.25", "0.25", "1", "1",
    ]  # fmt: skip
    assert [budget_name(0.0712345, "linf", like) for like in (0.1, 8 / 255)] == ["0.0712", "18.2/255"]
    assert budget_name(None, "l2") == "–"
