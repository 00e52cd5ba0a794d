"""Every training attack and estimator on the pretended accelerator: no mixed devices, few waits."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from sampled import product

from benchmarks.pretended import COUNTS, CUDA, accelerator, device_tensor, lend
from benchmarks.waits import DELTA, ESTIMATORS, SmallNetwork, TrainingSteps, images
from wdat import ThreatModel
from wdat.attacks import ATTACKS, Context, build
from wdat.attacks.budget import WPGDBudget
from wdat.certify import Smoothing, Surroundings
from wdat.distributed import current
from wdat.evaluation import ImageTensors, evaluate
from wdat.evaluation.evaluator import SETS
from wdat.gradients import undisturbed
from wdat.sensitivity import Sensitivity
from wdat.training.requests import SAVE, Requests, asked_by_any

TRAIN = ("wpgd_budget", "wpgd", "wfgsm", "pgd", "fgsm", "knapsack_budget", "critical", "critical_draw")
EVALUATE = [name for name, kind in ATTACKS.items() if name != "autoattack" and not kind.for_training
            and (name not in TRAIN or name in ("pgd", "wpgd"))]  # fmt: skip
CHOICES = [
    (attack, estimator)
    for attack, estimator in itertools.product((*TRAIN, "trades"), ESTIMATORS)
    if not (estimator == "ema" and attack in ("knapsack_budget", "critical", "critical_draw"))
]


def waits(counts):
    return "\n".join(f"{count:4} {line} {kind}" for (line, kind), count in counts.waits.most_common())


@pytest.mark.parametrize(("choice", "norm"), product(CHOICES, DELTA, every=5))
def test_a_training_step_mixes_no_devices(choice, norm):
    attack, estimator = choice
    for processes, pool in ((1, False), (2, False), (2, True)):
        with accelerator(processes):
            step = TrainingSteps(attack, norm, estimator, inner=2, size=8, processes=processes, pool=pool)
            loss = step(1)["loss"]
            assert loss.device == CUDA
            assert torch.isfinite(loss.raw)


def third_step(attack, norm, processes, **options):
    """Counts of a step for which what is done once is done, by the number of its inner steps."""
    step = TrainingSteps(attack, norm, inner=options.pop("inner", 10), processes=processes, **options)
    for number in (1, 2):
        step(number)
    COUNTS.clear()
    return step(3)


@pytest.mark.parametrize(
    ("norm", "processes", "attack"),
    product(DELTA, [1, 2], ["wpgd_budget", "knapsack_budget", "critical_draw", "trades"], every=3),
)
def test_a_training_step_hardly_waits(attack, processes, norm):
    """However many inner steps: at most six waits and two collective operations."""
    with accelerator(processes) as counts:
        third_step(attack, norm, processes, inner=3)
        assert counts.waits.total() <= 6, waits(counts)
        assert counts.collectives.total() == (2 if processes == 2 else 0), dict(counts.collectives)
        few = counts.totals()
        third_step(attack, norm, processes, inner=6)
        assert (counts.totals()[0], counts.totals()[2]) == (few[0], few[2]), waits(counts)


def test_a_step_carries_requests_to_the_other_processes():
    requests = Requests()
    with accelerator(2) as counts:
        step = TrainingSteps("wpgd_budget", "linf", inner=2, processes=2, requests=requests)
        assert asked_by_any(step(1)) == frozenset()
        requests.ask(SAVE)
        requests.ask("SIGTERM")
        counts.clear()
        assert asked_by_any(step(2)) == {SAVE, "SIGTERM"}
        assert counts.collectives.total() == 2, "those that it makes anyway"
        assert asked_by_any(step(3)) == frozenset(), "what was carried isn't asked for again"
    with accelerator():
        assert asked_by_any(TrainingSteps("wpgd_budget", "linf", inner=2, requests=requests)(1)) is None


@pytest.mark.parametrize(("norm", "attack"), product(DELTA, EVALUATE, every=2))
def test_an_evaluation_mixes_no_devices(attack, norm):
    """All of an evaluation, with pictures, on two processes of which one has no images, and on one."""
    options = {"knapsack": {"effort": "quick"}}.get(attack, {"steps": 2})
    threat = ThreatModel(2, norm, DELTA[norm])
    for processes in (1, 2):
        with accelerator(processes):
            torch.manual_seed(0)
            network, (x, y) = lend(SmallNetwork()), images(9)
            tensors = ImageTensors(x, y, device_tensor(torch.arange(9)))
            found = evaluate(
                network, tensors, threat, [build(attack, batch_size=4, **options)], batch_size=4,
                processes=current(CUDA), pictures=True, deltas=[2 * threat.delta],
            )  # fmt: skip
        assert [r.attack for r in found] == ["none", attack, attack]
        assert all(r.n == 9 for r in found)


@pytest.mark.filterwarnings("ignore:knapsack")  # the network is no robust one, and some images have no point
@pytest.mark.parametrize("attack", EVALUATE)
def test_images_may_stay_on_the_host(attack):
    """A set for which the device has no room goes to it pass by pass, also among processes, and nothing changes."""
    options = {"knapsack": {"effort": "quick", "starts": 2, "steps": 2, "refine": 2}}.get(attack, {"steps": 2})
    threat = ThreatModel(2, "l2", DELTA["l2"])
    torch.manual_seed(0)
    network = SmallNetwork()
    host = ImageTensors(*(part.raw for part in images(9)), torch.arange(9))
    given = {"attacks": [build(attack, batch_size=4, **options)], "batch_size": 4, "pictures": True}
    wanted = evaluate(network, host, threat, **given)
    lent = lend(network)
    for processes in (1, 2):
        with accelerator(processes):
            found = evaluate(lent, host, threat, processes=current(CUDA), **given)
        assert [r.accuracy for r in found] == [r.accuracy for r in wanted]
        assert [r.distance for r in found] == pytest.approx([r.distance for r in wanted], rel=1e-4)


def test_images_to_certify_may_stay_on_the_host():
    threat = ThreatModel(2, "l2", DELTA["l2"])
    torch.manual_seed(0)
    network = SmallNetwork().eval()
    x, y = (part.raw[:3] for part in images(3))
    wanted = Smoothing(samples=8)(network, x, y, [threat]).figures(threat)
    with accelerator(2):
        around = Surroundings(torch.arange(3), current(CUDA))
        found = Smoothing(samples=8)(lend(network), x, y, [threat], around).figures(threat)
    assert found["accuracy"] == pytest.approx(wanted["accuracy"], rel=1e-6)


@pytest.mark.parametrize("roomy", [True, False])
def test_a_set_is_on_the_device_where_an_attack_on_it_has_room(monkeypatch, roomy):
    """Memory that PyTorch holds and doesn't use is free too."""
    parts = [(torch.rand(2, 3, 1, 1), torch.zeros(2, dtype=torch.int64)) for _ in range(2)]
    size = 4 * 3 * 4  # bytes of the images
    memory = {"mem_get_info": (SETS * size - 100, 10**9), "memory_reserved": 300, "memory_allocated": 200 + (not roomy)}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    said = nullcontext() if roomy else pytest.warns(UserWarning, match=r"stay in the host's memory.*data\.limit_test")
    with accelerator(), said:
        kept = ImageTensors.join(iter(parts), CUDA)
    assert kept.x.device == (CUDA if roomy else torch.device("cpu"))
    assert torch.equal(kept.x.raw if roomy else kept.x, torch.cat([x for x, _ in parts]))


@pytest.mark.parametrize("name", ["wpgd_budget", "wpgd", "wfgsm", "fgsm"])
def test_the_device_says_what_the_cpu_says(name):
    """The same numbers: the same kernels run."""
    threat = ThreatModel(2, "l2", DELTA["l2"])
    torch.manual_seed(0)
    network = SmallNetwork()
    x, y = (part.raw for part in images(9))
    attack = build(name, **({} if "fgsm" in name else {"steps": 3}))
    wanted = attack(network, x, y, threat)
    with accelerator():
        found = attack(lend(network), device_tensor(x), device_tensor(y), threat, Context(processes=current(CUDA)))
        assert found.x_adv.device == CUDA
    torch.testing.assert_close(found.x_adv.raw, wanted.x_adv, rtol=1e-5, atol=1e-6)
    assert found.accuracy == wanted.accuracy


class Counting(SmallNetwork):
    """Counts its calls in a buffer, also in eval mode, and notes how many images came."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.sizes: list[int] = []

    def forward(self, x):
        self.calls.add_(1)
        self.sizes.append(len(x))
        return super().forward(x)


class Renewing(SmallNetwork):
    """Its BatchNorm renews its statistics also in eval mode."""

    def forward(self, x):
        self.norm.train()
        return super().forward(x)


@pytest.mark.parametrize("kind", [Counting, Renewing])
def test_buffers_that_are_written_to_are_restored(kind):
    """PyTorch doesn't count BatchNorm's writing into its statistics, only that of its number of batches."""
    with accelerator():
        network = lend(kind())
        before = {name: buffer.raw.clone() for name, buffer in network.named_buffers()}
        for _ in range(2):
            with undisturbed(network):
                network(images(4)[0])
                assert any(not torch.equal(b.raw, before[name]) for name, b in network.named_buffers())
            assert all(torch.equal(buffer.raw, before[name]) for name, buffer in network.named_buffers())


@pytest.mark.parametrize(("moving", "passed"), [(5, 32), (32, 32), (33, 40), (40, 40)])
def test_images_without_a_radius_fill_a_batch_up_to_a_multiple_of_32(moving, passed):
    torch.manual_seed(0)
    network, x = Counting(), torch.rand(40, 3, 8, 8)
    radii = torch.where(torch.randperm(40) < moving, 0.1, 0.0)

    class Fixed(WPGDBudget):
        def _radii(self, norms, sensitivity, threat, context):
            return radii if norms.device.type == "cpu" else device_tensor(radii)

    y, threat, attack = torch.zeros(40, dtype=torch.int64), ThreatModel(2, "linf", 0.1), Fixed(steps=3)
    wanted = attack(network, x, y, threat, Context(training=True, sensitivity=Sensitivity(2))).x_adv
    assert set(network.sizes[1:]) == {moving}
    with accelerator():
        lent = lend(network)
        lent.sizes.clear()
        context = Context(training=True, sensitivity=Sensitivity(2), processes=current(CUDA))
        found = attack(lent, device_tensor(x), device_tensor(y), threat, context).x_adv.raw
        assert set(lent.sizes[1:]) == {passed}
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[radii == 0], x[radii == 0])
