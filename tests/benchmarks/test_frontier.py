"""The frontier study: every method composes, at equal passes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from sampled import sampled

from benchmarks import frontier
from sweeps import grids
from wdat.threat import parse_budget

ROOT = Path(__file__).parents[2]
RATES = {"fast": 2.5, "slow": 0.4, "slower": 0.15}
STUDY = frontier.study_of("cnn_a", Path("out"), Path("FILE.npz"))


@pytest.mark.parametrize(
    "arm", sampled([f"{name}-{list(method.arms)[-1]}" for name, method in frontier.METHODS.items()], 4)
)
def test_every_method_composes_and_costs_what_the_others_cost(arm):
    cfg = grids.composed(STUDY.training(arm, 1)[1:])
    objective, attack = instantiate(cfg.objective), instantiate(cfg.attack)
    assert cfg.trainer.max_epochs * frontier.ARMS[arm].passes == frontier.PASSES
    inner = getattr(objective, "pointwise_attack", attack)
    if not arm.startswith("wrm"):
        assert inner.steps * inner.step_size == pytest.approx(2.5, rel=1e-3)
    assert objective.gce_q == {"gce8_sr": 0.8}.get(arm.split("-")[0], 0.5 if "gce" in arm else 0)
    assert cfg.optimizer.lr == pytest.approx(0.005 * RATES.get(re.split("[_-]", arm)[0], 1))
    assert (cfg.data.limit_train, cfg.data.val_size) == (frontier.IMAGES, frontier.VALIDATION)
    pointwise = getattr(objective, "pointwise_delta", None)
    reach = parse_budget(pointwise) if pointwise else instantiate(cfg.threat).delta
    assert reach == pytest.approx(float(arm.split("-")[1]) * 2 / 255)


def test_the_evaluation_serves_every_order():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("evaluate", frontier.evaluation(STUDY, "pgd_at-1.5", 1)[1:])
    assert (cfg.threat.p, list(cfg.deltas), cfg.split, cfg.save_distances) == (1, ["2/255", "4/255"], "test", True)
