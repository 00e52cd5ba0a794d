"""Shared by the tests of the training step: digits, and the configurations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from small_training import CONF, digits


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Ninety further digits, made a little different, as a file of a pool."""
    held = digits(limit_train=None).images("train")
    last = torch.arange(len(held) - 90, len(held))
    file = tmp_path_factory.mktemp("pool") / "pool.npz"
    images = held.pixels(last, None).permute(0, 2, 3, 1).numpy() // 2
    np.savez(file, image=images, label=held.labels[last].numpy())
    return file


@pytest.fixture(scope="module")
def chosen():
    """`chosen(group, choice)` is that configuration, of the real files, its inner attacks cut to two steps."""
    known = {}

    def one(group, choice):
        if (group, choice) not in known:
            extra = ["objective.pointwise_attack.steps=2"] if choice in ("trades", "combined", "pgd_at", "mart") else []
            extra += ["attack.steps=2"] if ("pgd" in choice or choice in ("wrm", "udr")) and group == "attack" else []
            extra += ["sensitivity.every=2"] if choice in ("exact", "subsample") else []
            with initialize_config_dir(str(CONF), version_base="1.3"):
                known[group, choice] = compose("config", [f"{group}={choice}", *extra])[group]
        return instantiate(known[group, choice])

    return one
