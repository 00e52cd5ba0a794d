"""Records, in and out of JSON."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import pytest

from wdat import records
from wdat.errors import SettingError
from wdat.records import Record, RecordFile, read, write


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
