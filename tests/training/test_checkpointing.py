"""Checkpoints that a stop, a full disk or a damaged file can't take away."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from wdat.errors import RunError, SettingError
from wdat.training import checkpointing as checkpoints
from wdat.training.checkpointing import SafeCheckpointIO, damage, newest, previous, resume_hint, steps


def checkpoint(step, value=None):
    weights = torch.full((1000,), float(step) if value is None else value)
    return {"state_dict": {"w": weights}, "loops": {}, "optimizer_states": [], "global_step": step}


@pytest.fixture
def run(tmp_path):
    """A run that has saved steps 1 and 2."""
    for step in (1, 2):
        SafeCheckpointIO().save_checkpoint(checkpoint(step), tmp_path / checkpoints.FOLDER / checkpoints.LAST)
    return tmp_path


def last(run):
    return run / checkpoints.FOLDER / checkpoints.LAST


def test_the_checkpoint_before_is_kept(run):
    assert (steps(last(run)), steps(previous(last(run)))) == (2, 1)
    assert {f.name for f in last(run).parent.iterdir()} == {"last.ckpt", "last.previous.ckpt"}
    assert newest(run) == (last(run), None)


def test_a_full_disk_is_reported_before_the_old_checkpoint_is_touched(run, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        RunError, match=r"last\.ckpt couldn't be written \(No space left on device\).*still that of before"
    ):
        SafeCheckpointIO().save_checkpoint(checkpoint(3), last(run))
    assert (steps(last(run)), steps(previous(last(run)))) == (2, 1)
    assert {f.name for f in last(run).parent.iterdir()} == {"last.ckpt", "last.previous.ckpt"}


def test_a_file_system_without_hard_links(run, monkeypatch):
    def refused(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    SafeCheckpointIO().save_checkpoint(checkpoint(3), last(run))
    assert (steps(last(run)), steps(previous(last(run)))) == (3, 2)
    assert {f.name for f in last(run).parent.iterdir()} == {"last.ckpt", "last.previous.ckpt"}


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        path = disk / "run" / checkpoints.FOLDER / checkpoints.LAST
        SafeCheckpointIO().save_checkpoint(checkpoint(1), path)
        big = checkpoint(2) | {"state_dict": {"w": torch.zeros(100_000)}}
        with pytest.raises(RunError, match="No space left on device"):
            SafeCheckpointIO().save_checkpoint(big, path)
        assert steps(path) == 1
        assert [f.name for f in path.parent.iterdir()] == ["last.ckpt"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(run, value):
    with pytest.raises(RunError, match=r"weights w are no longer finite.*smaller optimizer\.lr"):
        SafeCheckpointIO().save_checkpoint(checkpoint(3, value), last(run))
    assert steps(last(run)) == 2


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def flipped(path):
    """One byte of a tensor, which torch.load doesn't notice."""
    data = bytearray(path.read_bytes())
    at = data.index(torch.full((4,), 2.0).numpy().tobytes())
    data[at] ^= 0xFF
    path.write_bytes(bytes(data))


def empty(path):
    path.write_bytes(b"")


def page(path):
    path.write_text("<html>Quota exceeded</html>")


def foreign(path):
    torch.save({"w": torch.zeros(2)}, path)


def gone(path):
    path.unlink()


@pytest.mark.parametrize("spoil", [truncated, flipped, empty, page, foreign, gone])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(run, spoil):
    spoil(last(run))
    assert damage(last(run))
    path, notice = newest(run)
    assert path == previous(last(run))
    assert "last.ckpt can't be used" in notice
    assert "last.previous.ckpt, step 1" in notice


def test_a_flipped_byte_is_noticed_though_torch_loads_it(run):
    flipped(last(run))
    assert torch.load(last(run), weights_only=True)["global_step"] == 2
    assert "damaged" in damage(last(run))


def test_the_way_on_from_a_run(run):
    assert resume_hint(run) == f"continue with resume={run}"
    last(run).unlink()
    assert "start the run again" in resume_hint(run)


def test_two_damaged_checkpoints_are_refused(run):
    for path in (last(run), previous(last(run))):
        empty(path)
    with pytest.raises(SettingError, match=r"resume=.*last\.ckpt can't be used.*nor can last\.previous\.ckpt.*again"):
        newest(run)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(tmp_path):
    path, proof = tmp_path / "evil.ckpt", tmp_path / "proof"
    torch.save({"state_dict": Payload(proof)}, path)
    with pytest.raises(Exception, match="Weights only load failed"):
        SafeCheckpointIO().load_checkpoint(path, weights_only=False)
    assert damage(path)
    assert not proof.exists()
