"""The command line of a resumed run."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from wdat.cli.arguments import CommandLine, quoted, unquoted
from wdat.cli.origin import SIGNATURE, resumed, signature
from wdat.errors import SettingError

HYDRA = {
    "hydra": {
        "job": {"config_name": "config"}, "overrides": {"hydra": []},
        "runtime": {"config_sources": [{"provider": "main", "path": "/conf"}]},
    }
}  # fmt: skip


@pytest.fixture
def run_in(tmp_path):
    """`run_in(name, *overrides)` is the folder of a stopped run."""

    def make(name="run", *overrides, hydra=HYDRA, signed=False):
        folder = tmp_path / name / ".hydra"
        folder.mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(list(overrides)), folder / "overrides.yaml")
        OmegaConf.save(OmegaConf.create(hydra), folder / "hydra.yaml")
        if signed:
            parts = [(folder / file).read_bytes() for file in ("hydra.yaml", "overrides.yaml")]
            (folder / SIGNATURE).write_bytes(signature(*parts, create=True))
        return folder.parent

    return make


def parsed(*words):
    """Names and values as Hydra understands them; a sweep or a syntax error would not be one value."""
    overrides = OverridesParser.create().parse_overrides(list(resumed(CommandLine.parse(words)).overrides))
    assert not any(o.is_sweep_override() for o in overrides)
    return [(o.key_or_group, o.value()) for o in overrides]


@pytest.mark.parametrize("words", [[], ["data=digits"], ["resume=null"], ["resume="], ["model=x", "-m", "seed=1,2"]])
def test_nothing_to_resume(words):
    line = CommandLine.parse(words)
    assert resumed(line) == line


def test_old_settings_then_new_ones_then_the_folder(run_in):
    run = run_in("run", "experiment=quickstart", "trainer.max_epochs=2", "resume=null")
    assert parsed(f"resume={run}", "trainer.max_epochs=5") == [
        ("experiment", "quickstart"),
        ("trainer.max_epochs", 2),
        ("trainer.max_epochs", 5),
        ("hydra.mode", "RUN"),
        ("hydra.run.dir", str(run)),
        ("resume", str(run)),
    ]


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_around_the_folder(run_in, quote):
    run = run_in()
    assert parsed(f"resume={quote}{run}{quote}")[-1] == ("resume", str(run))


def test_the_last_one_counts(run_in):
    old, new = run_in("old"), run_in("new")
    assert dict(parsed(f"resume={old}", f"resume={new}"))["hydra.run.dir"] == str(new)


def test_an_override_is_put_in_once(run_in):
    """`+key=value` may stand in a command line once only."""
    run = run_in("run", "+trainer.max_time=1", "data=digits")
    found = parsed(f"resume={run}", "+trainer.max_time=1")
    assert [key for key, _ in found][:2] == ["data", "trainer.max_time"]


@pytest.mark.parametrize("name", ["lr=0.1,seed=3", "with space", "a(1)", "[x]", "ünï", "it's", "50%", "a{b}"])
def test_any_name_of_a_folder(run_in, name):
    """Such names come from Hydra's own `override_dirname`."""
    run = run_in(name)
    assert parsed(f"resume={run}")[-2:] == [("hydra.run.dir", str(run)), ("resume", str(run))]
    assert unquoted(quoted(run)) == str(run)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(SettingError, match=r"resume=.*nowhere is not the folder of a run.*overrides\.yaml"):
        parsed(f"resume={tmp_path / 'nowhere'}")


def test_a_sweep_resumes_nothing(run_in):
    with pytest.raises(SettingError, match="--multirun"):
        parsed(f"resume={run_in()}", "-m", "seed=0,1")


ELSEWHERE = {
    "hydra": {
        "job": {"config_name": "mine"}, "overrides": {"hydra": ["hydra.searchpath=[file:///more]", "hydra.run.dir=x"]},
        "runtime": {"config_sources": [{"provider": "main", "path": "/conf"},
                                       {"provider": "command-line", "path": "/own"}]},
    }
}  # fmt: skip


def test_ones_own_run_remembers_where_its_configuration_came_from(run_in):
    run = run_in("run", "+callbacks.x._target_=own.Callback", hydra=ELSEWHERE, signed=True)
    found = resumed(CommandLine.parse([f"resume={run}"]))
    assert found.flags == {"config_name": "mine", "config_dir": "/own"}
    assert found.overrides[:2] == ("hydra.searchpath=[file:///more]", "+callbacks.x._target_=own.Callback")
    assert CommandLine.parse(found.words) == found
    typed = resumed(CommandLine.parse(["-cd", "other", f"resume={run}"]))
    assert typed.flags == {"config_name": "mine", "config_dir": "other"}


@pytest.mark.parametrize("change", ["hydra.yaml", "overrides.yaml", SIGNATURE, "another user"])
def test_what_this_user_has_not_begun_must_be_repeated(run_in, change, monkeypatch, tmp_path):
    run = run_in("run", "data=digits", hydra=ELSEWHERE, signed=True)
    if change == "another user":
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    else:
        with (run / ".hydra" / change).open("ab") as file:
            file.write(b"\n")
    with pytest.raises(SettingError, match=r"has '--config-name=mine'.*repeat it on the command line"):
        parsed(f"resume={run}")
    flags = ["-cn", "mine", "--config-dir", "/own", "hydra.searchpath=[file:///more]"]
    assert ("data", "digits") in parsed(f"resume={run}", *flags)


def test_the_key_is_this_users_alone(run_in, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run_in(signed=True)
    key = tmp_path / "state" / "wdat" / "key"
    assert key.stat().st_mode & 0o077 == 0
    assert len(key.read_bytes()) == 32


# --- flags and overrides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [["a=1", "--config-dir", "X", "b=2"], ["-cd", "X", "a=1", "b=2"], ["a=1", "b=2", "--config-dir=X"]],
)
def test_flags_may_stand_anywhere(words):
    assert CommandLine.parse(words) == CommandLine({"config_dir": "X"}, ("a=1", "b=2"))


def test_home_is_meant_as_in_a_shell(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    line = CommandLine.parse(["data.path=~/a b.npz", "~logger", "x=a~b"])
    assert line.overrides == ("data.path='/home/me/a b.npz'", "~logger", "x=a~b")


@pytest.mark.parametrize("words", [["--cfg", "job"], ["--help"], ["-i"], ["--hydra-help"], ["-sc", "install=bash"]])
def test_showing_runs_nothing(words):
    line = CommandLine.parse(words)
    assert not line.runs
    assert CommandLine.parse(line.words) == line
