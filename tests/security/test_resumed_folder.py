"""A folder to resume holds data, not programs."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf

from wdat.cli.arguments import CommandLine
from wdat.cli.origin import resumed
from wdat.errors import SettingError

FOREIGN = [
    "model._target_=torch.load", "+callbacks.x={_target_:os.system,command:ls}", "--config-dir=/tmp", "-m",
    "hydra.searchpath=[file:///tmp]", "hydra/launcher=x", "+hydra.job.env_set.A=b", "data=../../tmp/evil",
    "+experiment=../x", "data=/tmp/evil", "data='${seed}'", "experiment=[quickstart,../x]", "++hydra.run.dir=/tmp",
    "data@model=/tmp/evil",
]  # fmt: skip


def resume(folder, *words):
    return resumed(CommandLine({}, (*words, f"resume={folder}"))).overrides


def test_resuming_writes_no_value_of_the_environment_down(tmp_path):
    (tmp_path / ".hydra").mkdir()
    said = ["model.checkpoint='${oc.env:WANDB_API_KEY}'", "deltas=['${threat.delta}']"]
    (tmp_path / ".hydra" / "overrides.yaml").write_text("".join(f"- {json.dumps(line)}\n" for line in said))
    assert list(resume(tmp_path)[:2]) == said


@pytest.mark.parametrize("override", FOREIGN)
def test_a_resumed_folder_brings_no_code_of_its_own(tmp_path, override):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text(f"- data=digits\n- {json.dumps(override)}\n")
    with pytest.raises(SettingError, match=r"resume=.*\.hydra has.*command line"):
        resume(tmp_path)
    assert resume(tmp_path, override).count(override) == 1, "what the user writes is the user's"


@pytest.mark.parametrize(
    "override", ["data.path=../x.npz", "certified=../radii.npy", "model.checkpoint=/a/b.pt", "~logger", "seed=3",
                 "+trainer.limit_train_batches=2", "deltas=[2/255,8/255]", "attack_options={wpgd:{steps:3}}"],
)  # fmt: skip
def test_ordinary_settings_are_resumed(tmp_path, override):
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create([override]), tmp_path / ".hydra" / "overrides.yaml")
    assert resume(tmp_path)[0] == override
