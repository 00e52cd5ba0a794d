"""The command line of a resumed run."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from wdat.cli.resume import check_folder, resumed_arguments
from wdat.errors import SettingError


@pytest.fixture
def run_in(tmp_path):
    """`run_in(name, *overrides)` is the folder of a stopped run."""

    def make(name="run", *overrides, checkpoint=True):
        folder = tmp_path / name
        (folder / ".hydra").mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(list(overrides)), folder / ".hydra" / "overrides.yaml")
        if checkpoint:
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "last.ckpt").touch()
        return folder

    return make


def parsed(arguments):
    """Names and values as Hydra understands them; a sweep or a syntax error would not be one value."""
    overrides = OverridesParser.create().parse_overrides(list(arguments))
    assert not any(o.is_sweep_override() for o in overrides)
    return [(o.key_or_group, o.value()) for o in overrides]


@pytest.mark.parametrize(
    "arguments", [[], ["data=digits"], ["resume=null"], ["resume="], ["model=x", "-m", "seed=1,2"]]
)
def test_nothing_to_resume(arguments):
    assert resumed_arguments(arguments) == arguments


def test_old_settings_then_new_ones_then_the_folder(run_in):
    run = run_in("run", "experiment=quickstart", "trainer.max_epochs=2", "resume=null")
    found = parsed(resumed_arguments([f"resume={run}", "trainer.max_epochs=5"]))
    assert found == [
        ("experiment", "quickstart"),
        ("trainer.max_epochs", 2),
        ("trainer.max_epochs", 5),
        ("hydra.run.dir", str(run)),
        ("resume", str(run)),
    ]


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_around_the_folder(run_in, quote):
    run = run_in()
    assert parsed(resumed_arguments([f"resume={quote}{run}{quote}"]))[-1] == ("resume", str(run))


def test_the_last_one_counts(run_in):
    old, new = run_in("old"), run_in("new")
    assert parsed(resumed_arguments([f"resume={old}", f"resume={new}"]))[-2:] == [
        ("hydra.run.dir", str(new)),
        ("resume", str(new)),
    ]


def test_a_run_may_be_resumed_twice(run_in):
    run = run_in("run", "data=digits")
    first = resumed_arguments([f"resume={run}", "trainer.max_epochs=5"])
    again = run_in("again", *(a for a in first if not a.startswith("hydra.")))  # as Hydra writes them down
    found = parsed(resumed_arguments([f"resume={again}", "trainer.max_epochs=9"]))
    assert [value for key, value in found if key == "resume"] == [str(again)]
    assert [value for key, value in found if key == "trainer.max_epochs"] == [5, 9]


@pytest.mark.parametrize("name", ["lr=0.1,seed=3", "with space", "a(1)", "[x]", "ünï", "it's", "50%", "a{b}"])
def test_any_name_of_a_folder(run_in, name):
    """Such names come from Hydra's own `override_dirname`."""
    run = run_in(name)
    assert parsed(resumed_arguments([f"resume={run}"])) == [("hydra.run.dir", str(run)), ("resume", str(run))]


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(SettingError, match=r"resume=.*nowhere is not the folder of a run.*overrides\.yaml"):
        resumed_arguments([f"resume={tmp_path / 'nowhere'}"])


def test_a_run_that_stopped_too_early(run_in):
    with pytest.raises(SettingError, match=r"resume=.*last\.ckpt.*saved anything"):
        resumed_arguments([f"resume={run_in(checkpoint=False)}"])


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SettingError, match=r"hydra\.run\.dir=.*file/run can't be written"):
        check_folder([f"hydra.run.dir={tmp_path / 'file' / 'run'}"])


@pytest.mark.parametrize("arguments", [[], ["hydra.run.dir=outputs/${now:%H}"], ["hydra.run.dir='new run'"]])
def test_other_folders_pass(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    check_folder(arguments)
    assert [f.name for f in tmp_path.iterdir()] == (["new run"] if arguments and "new" in arguments[0] else [])
