"""Whole runs with hostile names, and with secrets in the environment: no secret is written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hostile import EVALUATE, EVALUATED, SECRETS, TRAIN, TRAINED, Page
from script_runner import run_script


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def holds_a_secret(result, folder):
    """Names of what a run wrote that hold a value of the environment which they shouldn't."""
    written = {**contents(folder), "stdout": result.out.encode(), "stderr": result.err.encode()}
    return [name for name, data in written.items() if any(s.encode() in data for s in SECRETS.values())]


@pytest.fixture
def hostile_images(tmp_path):
    """A file of images whose name is HTML."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), np.arange(40) % 10
    path = tmp_path / "<img src=x onerror=alert(1)>[red].npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    return path


def test_an_evaluation_of_hostile_names_keeps_its_folder_and_its_secrets(tmp_path, hostile_images):
    folder = tmp_path / "a[" / "]b" / "[bold]"
    result = run_script(
        EVALUATE, *EVALUATED, "data=npz", f"data.path='{hostile_images}'", "data.val_size=10", "save_distances=true",
        f"hydra.run.dir='{folder}'",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert str(folder / "report.html") in result.out
    assert hostile_images.stem in result.out
    Page((folder / "report.html").read_text(encoding="utf-8")).check()
    known = {"records.json", "report.html", "curve.png", "nearest_linf.pt", "distances_linf.npz"}
    hydra = {f".hydra/{name}" for name in ("config.yaml", "overrides.yaml", "hydra.yaml", "signature")}
    found = set(contents(folder))
    assert {name for name in found if not name.startswith("examples/")} == known | hydra
    assert all(re.fullmatch(r"examples/[\w.-]+\.png", name) for name in found - known - hydra)
    assert {p.name for p in tmp_path.iterdir()} == {"here", "a[", hostile_images.name}
    assert not list(Path.cwd().iterdir())
    assert holds_a_secret(result, folder) == []


@pytest.mark.long
def test_a_training_keeps_its_folder_and_its_secrets(tmp_path):
    folder = tmp_path / "a[" / "]b"
    result = run_script(TRAIN, *TRAINED, f"hydra.run.dir='{folder}'")
    assert result.status == 0, result.err
    assert str(folder / "records.json") in result.out
    assert holds_a_secret(result, folder) == []
    assert {p.name for p in tmp_path.iterdir()} == {"here", "a["}
    assert not list(Path.cwd().iterdir())


def test_the_search_for_secrets_finds_them(tmp_path):
    """Guards the guard."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x.log").write_text(f"key={SECRETS['WANDB_API_KEY']}")
    said = SimpleNamespace(out=SECRETS["WDAT_TEST_TOKEN"], err="")
    assert holds_a_secret(said, tmp_path) == ["deep/x.log", "stdout"]


@pytest.mark.long
def test_wandbs_own_files_hold_no_secret(tmp_path):
    """In an interpreter of its own, because W&B starts processes."""
    folder = tmp_path / "run"
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TRAIN), *TRAINED, "logger=wandb", f"hydra.run.dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert any("wandb" in name for name in contents(folder))
    assert holds_a_secret(SimpleNamespace(out=done.stdout, err=done.stderr), folder) == []
    shutil.rmtree(folder)
