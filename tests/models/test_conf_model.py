"""The configurations of the models: one file per choice, each of which builds what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from wdat.models import LOCAL, describe, zoo

CONF = Path(__file__).parents[2] / "conf"


def composed(choice: str, *overrides: str) -> Any:
    """The group `model` alone, with the two keys that it takes from elsewhere."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=[f"+model={choice}", "+data.num_classes=10", "+seed=0", *overrides])
    return config.model


def test_one_file_per_choice() -> None:
    assert {path.stem for path in (CONF / "model").glob("*.yaml")} == {
        *LOCAL,
        *zoo.ALIASES,
        "robustbench",
        "timm",
        "custom",
    }


@pytest.mark.parametrize("choice", sorted(LOCAL))
def test_local(choice: str) -> None:
    config = composed(choice)
    assert config.name == choice
    assert (config.num_classes, config.checkpoint, config.seed) == (10, None, 0)


def test_builds() -> None:
    assert describe(instantiate(composed("resnet2b"))) == ("SmallResNet", 112_006)


@pytest.mark.parametrize("choice", sorted(zoo.ALIASES))
def test_alias(choice: str) -> None:
    config = composed(choice, "model.root=elsewhere")
    assert (config.name, config.dataset, config.threat_model, config.root) == (choice, "cifar10", "Linf", "elsewhere")


def test_any_name_of_the_zoo() -> None:
    assert OmegaConf.is_missing(composed("robustbench"), "name")
    assert composed("robustbench", "model.name=Wong2020Fast").name == "Wong2020Fast"
