"""Both scripts on photographs in class folders, with a network of RobustBench's zoo that says how they are cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from script_runner import run_script
from torch import nn

from wdat.models import zoo
from wdat.records import read

ROOT = Path(__file__).parents[1]
EVALUATION = "evaluation.attack_options"
SETTINGS = [
    "model=robustbench", "model.name=Wong2020Fast", "model.dataset=imagenet", "data=imagenet", "data.root=photographs",
    "data.num_classes=4", "data.val_size=4", "data.limit_test=8", "data.workers=1",
    "hydra.run.dir=run",
]  # fmt: skip
TRAINING = [
    "trainer.accelerator=cpu", "trainer.devices=1", "trainer.max_epochs=1", "evaluation.curve=[]", "attack.steps=2",
    "data.batch_size=6", "data.limit_train=18", f"{EVALUATION}.pgd.steps=2",
    f"{EVALUATION}.wpgd.steps=2", f"{EVALUATION}.wpgd.loss=ce",
]  # fmt: skip


class Colours(nn.Sequential):
    """Classifies by the mean colour; remembers the sizes of the images that it saw."""

    def __init__(self) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
        self.sizes: set[tuple[int, ...]] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.add(tuple(x.shape[1:]))
        return super().forward(x)


@pytest.fixture
def network(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for split, each in (("train", 6), ("val", 3)):
        for name in "abcd":
            (tmp_path / "photographs" / split / name).mkdir(parents=True)
            for k in range(each):
                pixels = rng.integers(0, 256, (290 + k, 320 - k, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photographs" / split / name / f"{k}.JPEG")
    made = Colours()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setitem(zoo.CLASSES, "imagenet", 4)
    monkeypatch.setattr("wdat.models.build.load_zoo", lambda *_: made.eval())
    return made


def test_an_evaluation_cuts_as_robustbench_does_for_the_network(network):
    result = run_script(
        ROOT / "evaluate.py",
        *SETTINGS,
        "trainer.accelerator=cpu",
        "attacks=[pgd]",
        "losses=[ce]",
        "attack_options.pgd.steps=2",
    )
    assert (result.status, result.err) == (0, "")
    records = read(Path("run/records.json"))
    assert {(r.data, r.n) for r in records} == {("imagenet:Crop288", 8)}
    assert network.sizes == {(3, 288, 288)}


@pytest.mark.long
def test_training_with_another_preprocessing_of_the_users(network):
    before = network[2].weight.detach().clone()
    result = run_script(ROOT / "train.py", *SETTINGS, *TRAINING, "data.preprocessing=Res40Crop32")
    assert (result.status, result.err) == (0, "")
    records = read(Path("run/records.json"))
    assert {(r.data, r.n) for r in records if r.split == "test"} == {("imagenet:Res40Crop32", 8)}
    assert {r.stage for r in records} == {"before", "epoch", "after"}
    assert network.sizes == {(3, 32, 32)}
    assert not torch.equal(network[2].weight, before)
    assert "decodes all 18 training images; sensitivity=subsample decodes 1,024" in " ".join(result.out.split())


def test_training_without_training_images_is_refused(network):
    Path("photographs/train").rename("elsewhere")
    result = run_script(ROOT / "train.py", *SETTINGS, *TRAINING)
    assert result.status != 0
    assert "data.root=photographs has no training images (train/)" in result.err
    assert "Traceback" not in result.err
