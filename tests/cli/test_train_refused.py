"""What train.py says of bad input: an error of one line with its remedy, and no folder."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from quick_run import LOCALLY, QUICK, train
from sampled import sampled

from wdat import models
from wdat.models import zoo


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


def npz(path, labels=(0, 1, 2, 3, 4, 5, 6, 7), size=32):
    images, labels = np.zeros((8, size, size, 3), np.uint8), np.array(labels)
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return path


def refused(*arguments):
    """The message of a run that must fail: a line or two, no traceback, status 2."""
    short = ["pretrain.max_epochs=0", "trainer.max_epochs=1", "data.limit_train=32", "+trainer.max_time=00:00:00:03"]
    result = train(*QUICK, *short, "hydra.run.dir=run", *arguments)
    assert "Traceback" not in result.out + result.err
    assert result.status == 2, result.err[-600:]
    assert result.err.startswith("error: ")
    assert result.err.count("\n") <= 2
    assert not Path("run").exists(), "noticed before any work"
    return result.err


BAD = {  # the others are those of test_build.py
    "model=robustbench model.name=Rebufi2021Fixing_70_16": ["model.name", "Rebuffi2021Fixing_70_16_cutmix_ddpm"],
    "model=robustbench model.name=Rebuffi2021Fixing_70_16": ["model.name", "Rebuffi2021Fixing_70_16_cutmix_ddpm"],
    "model=robustbench": ["model.name"],
    "attack.steps=0": ["attack.steps", "at least 1"],
    "data=npz": ["data.path"],
    "data=npz data.path=missing.npz": ["data.path=missing.npz", "no such file"],
    "data.num_classes=7": ["data.num_classes", "10"],
    "optimizer.exempt=[norms]": ["optimizer.exempt", "norm"],
    "finetune.trainable=heads": ["finetune.trainable", "head"],
    "trainer.devices=3": ["data.batch_size=32", "over 3", "33"],
    "callbacks.checkpoint.mode=maxx": ["callbacks.checkpoint", "maxx"],
    "optimizer._target_=torch.optim.AdamW": ["argument of AdamW", "~optimizer.momentum ~optimizer.nesterov"],
    "resume=nowhere": ["resume=nowhere", "not the folder of a run"],
}


@pytest.mark.parametrize("arguments", sampled(BAD, 4))
def test_bad_settings_are_named_with_a_remedy(arguments):
    message = refused(*arguments.split())
    for word in BAD[arguments]:
        assert word in message


def test_a_folder_of_a_logger_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = refused(f"logger.save_dir={tmp_path / 'file' / 'logs'}")
    assert "error: logger.save_dir=" in message
    assert "name another folder" in message


def test_labels_out_of_range_are_named(tmp_path):
    path = npz(tmp_path / "labels.npz", [0, 1, 2, 3, 4, 5, 6, 12])
    message = refused("data=npz", f"data.path={path}", "data.val_size=2")
    assert "y_train" in message
    assert "data.num_classes=13" in message


@pytest.mark.parametrize("measured", [[], ["callbacks.robust_evaluation=null"]])
def test_images_that_the_network_cannot_take_are_told_before_any_pass(tmp_path, measured):
    path = npz(tmp_path / "large.npz", size=64)
    message = refused("data=npz", f"data.path={path}", "data.val_size=2", *measured)
    assert "can't take images (1, 3, 64, 64)" in message


def checkpoint(kind, folder):
    path = folder / "weights.pt"
    if kind == "another architecture":
        torch.save(models.load_network("cnn_a").state_dict(), path)
    elif kind == "corrupt":
        torch.save(models.load_network("small_cnn").state_dict(), path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "pickled":
        torch.save(models.load_network("small_cnn"), path)
    elif kind == "a web page":
        path.write_text("<!DOCTYPE html><html>Quota exceeded</html>")
    return path


@pytest.mark.parametrize("kind", sampled(["another architecture", "missing", "corrupt", "pickled", "a web page"], 3))
def test_bad_checkpoints_are_named(kind, tmp_path):
    path = checkpoint(kind, tmp_path)
    message = refused(f"model.checkpoint={path}")
    assert "model.checkpoint" in message
    assert str(path) in message


def test_a_missing_network_of_the_zoo_says_where_to_put_it(monkeypatch, tmp_path):
    zoo.robustbench()
    monkeypatch.setattr("robustbench.utils.download_gdrive_new", _no_network)
    path = npz(tmp_path / "images.npz")
    message = refused(
        "model=Rebuffi2021", "attack=wpgd", "data=npz", f"data.path={path}", "data.val_size=2", "model.root=weights"
    )
    assert "model.name" in message
    assert str(tmp_path / "weights/cifar10/Linf/Rebuffi2021Fixing_28_10_cutmix_ddpm.pt") in message


def test_missing_images_say_where_to_put_them(monkeypatch, tmp_path):
    monkeypatch.setattr("wdat.data.cifar.download_and_extract_archive", _no_network)
    result = train("model=Rebuffi2021", "attack=wpgd", *LOCALLY, "hydra.run.dir=run", "data.root=images")
    assert result.status == 2
    assert "Traceback" not in result.out + result.err
    for word in ("data.root=images", str(tmp_path / "images" / "cifar-10-batches-py"), "data=npz"):
        assert word in result.err


def _no_network(*others, **options):
    raise URLError("Name or service not known")
