"""Weight averaging: the average by hand, who sees which weights, exceptions, resumed runs, checkpoints."""

from __future__ import annotations

import signal
import threading
from functools import partial

import lightning as L  # noqa: N812 (the customary name)
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import wdat
from wdat import models
from wdat.attacks.budget import PGD
from wdat.callbacks import ExponentialAveraging
from wdat.errors import SettingError
from wdat.sensitivity import Batch, Table

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings(r"ignore:.*module\(s\) in eval mode at the start of training"),
]


def with_batchnorm():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10)
    ).eval()  # fmt: skip


def weights(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def saved(path):
    """What a checkpoint holds: the average, the current weights, and the number of models averaged."""
    content = torch.load(path, weights_only=True)
    unprefixed = [
        {key.removeprefix("network."): value for key, value in content[part].items()}
        for part in ("state_dict", "current_model_state")
    ]
    return (*unprefixed, int(content["averaging_state"]["n_averaged"]))


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


class Trail(L.Callback):
    """The current weights before the first and after every step, and checkpoints where a folder is given."""

    def __init__(self, folder=None):
        self.folder, self.raw, self.seen = folder, [], []

    def on_train_start(self, trainer, pl_module):
        self.raw.append(weights(pl_module.network))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(weights(pl_module.network))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.raw.append(weights(pl_module.network))
        if self.folder:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class Scored(L.Callback):
    """The weights that validation scores in its steps and that callbacks score after it, by the number of steps."""

    def __init__(self):
        self.steps, self.ends = {}, {}

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.steps[trainer.global_step] = weights(pl_module.network)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.ends[trainer.global_step] = weights(pl_module.network)


class Stop(L.Callback):
    """Raises at a hook, after so many steps, with a checkpoint where a path is given."""

    def __init__(self, hook, steps, error=InterruptedError, path=None):
        self.steps, self.error, self.path = steps, error, path
        setattr(self, hook, self.stop)

    def stop(self, trainer, *_):
        if trainer.global_step == self.steps and not trainer.sanity_checking:
            if self.path:
                trainer.save_checkpoint(self.path)
            raise self.error


@pytest.fixture
def make(make_module):
    """`make(**settings)` is a module that moves far enough in a few steps for its average to differ."""
    return lambda **settings: make_module(**{"optimizer": SGD, **settings})


# --- the average ----------------------------------------------------------------------------------------------------


def by_hand(raw, names, decay, start):
    """The recursion in float64: the averages after each step from the weights before the first and after each."""
    averages = [raw[0]]
    for step, current in enumerate(raw[1:]):
        t = step - start
        d = min(decay, (1 + t) / (10 + t)) if t >= 0 else 0
        mixed = {key: d * averages[-1][key].double() + (1 - d) * current[key].double() for key in names}
        averages.append({**current, **mixed})
    return averages


@pytest.mark.parametrize(("start", "first"), [(0.0, 0), (0.25, 2), (0.5, 4)])
def test_the_average_is_the_recursion(start, first, digits, make, make_trainer, tmp_path):
    """Nine steps; with decay 0.3 the warm-up, 0.1, 2/11 and 3/12, is followed by 0.3."""
    trail, network = Trail(tmp_path), with_batchnorm()
    trainer = make_trainer(ExponentialAveraging(0.3, start), trail, max_epochs=3, precision="64-true")
    trainer.fit(make(network=network, sensitivity=Batch()), digits())
    names = [name for name, _ in network.named_parameters()]
    wanted = by_hand(trail.raw, names, 0.3, first)
    assert len(wanted) == 10
    for step in range(1, 10):
        average, current, count = saved(tmp_path / f"{step}.ckpt")
        assert same(current, trail.raw[step])
        assert count == step + 1
        assert same(average, current) == (step <= first), "the current weights before the start, and only then"
        for key, value in wanted[step].items():
            torch.testing.assert_close(average[key].double(), value.double(), rtol=0, atol=1e-12, msg=key)
    assert same(weights(network), average), "in the end the module holds the average"


def test_the_decay_of_the_recipe():
    averaging = ExponentialAveraging()
    assert [averaging.decay_at(t) for t in (-5, -1)] == [0, 0]
    assert [averaging.decay_at(t) for t in (0, 1, 8, 1789, 1790, 10**6)] == pytest.approx(
        [0.1, 2 / 11, 0.5, 1790 / 1799, 0.995, 0.995], abs=1e-12
    )


def test_single_precision_and_accumulated_steps(digits, make, make_trainer, tmp_path):
    """One update a step of the optimiser, not one a batch."""
    trail, network = Trail(tmp_path), with_batchnorm()
    averaging = ExponentialAveraging(0.3)
    trainer = make_trainer(averaging, trail, max_epochs=4, accumulate_grad_batches=3)
    trainer.fit(make(network=network), digits())
    raw = [trail.raw[0], *trail.raw[3::3]]
    wanted = by_hand(raw, [name for name, _ in network.named_parameters()], 0.3, 0)
    for step in range(1, 5):
        average, _, count = saved(tmp_path / f"{step}.ckpt")
        assert count == step + 1
        for key, value in wanted[step].items():
            torch.testing.assert_close(average[key].double(), value.double(), rtol=0, atol=1e-7, msg=key)


def test_statistics_are_the_current_ones(digits, make, make_trainer, tmp_path):
    trail, network = Trail(tmp_path), with_batchnorm()
    make_trainer(ExponentialAveraging(0.9), trail, max_epochs=2).fit(make(network=network), digits())
    average, current, _ = saved(tmp_path / "6.ckpt")
    assert all(torch.equal(average[name], current[name]) for name, _ in network.named_buffers())
    assert not torch.equal(average["4.weight"], current["4.weight"])
    assert not torch.equal(current["1.running_mean"], trail.raw[0]["1.running_mean"])


def test_what_is_frozen_stays_to_the_bit(digits, make, make_trainer, tmp_path):
    network = with_batchnorm()
    before = weights(network)
    trained = set(models.prepare(network, "head"))
    trail = Trail(tmp_path)
    module = make(network=network, keep_eval=models.keep_frozen_in_eval)
    make_trainer(ExponentialAveraging(0.9), trail, max_epochs=3).fit(module, digits())
    for found in (*saved(tmp_path / "7.ckpt")[:2], weights(network)):
        assert {key for key in before if not torch.equal(found[key], before[key])} == trained


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), "0.9", None, True])
@pytest.mark.parametrize("key", ["decay", "start"])
def test_settings_out_of_range_are_named(key, value):
    with pytest.raises(SettingError, match=rf"averaging\.{key}={value} must be a number in \[0, 1\)"):
        ExponentialAveraging(**{key: value})


def test_a_share_of_a_run_without_an_end_is_refused(digits, make, make_trainer):
    trainer = make_trainer(ExponentialAveraging(start=0.5), max_epochs=-1)
    with pytest.raises(SettingError, match=r"averaging\.start=0\.5 .*trainer\.max_epochs"):
        trainer.fit(make(), digits())


def test_checkpoints_that_would_leave_the_average_out_are_refused(digits, make, make_trainer, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_weights_only=True)
    trainer = make_trainer(ExponentialAveraging(), checkpoint, enable_checkpointing=True)
    with pytest.raises(SettingError, match="save_weights_only=false"):
        trainer.fit(make(), digits())


# --- who sees which weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("last", [True, False])
def test_what_is_scored_is_what_is_saved(last, every, digits, make, make_trainer, tmp_path):
    """Whatever the order of the callbacks: the current weights before the start, afterwards the average."""
    averaging, trail, scored = ExponentialAveraging(0.9, start=0.5), Trail(), Scored()
    checkpoint = ModelCheckpoint(tmp_path, "{step}", monitor="val/acc_clean", save_top_k=-1, auto_insert_metric_name=0)
    order = [trail, scored, averaging] if last else [averaging, trail, scored]
    options = {"enable_checkpointing": True, "max_epochs": 4, "check_val_every_n_epoch": every}
    make_trainer(*order, checkpoint, **options).fit(make(network=with_batchnorm()), digits())
    assert set(scored.ends) == set(range(3 * every, 13, 3 * every))
    for step, network in scored.ends.items():
        assert same(scored.steps[step], network)
        average, current, _ = saved(tmp_path / f"{step}.ckpt")
        assert same(network, average)
        assert same(current, trail.raw[step])
        assert same(average, current) == (step <= 6)
        assert not same(average, trail.raw[0]), "the initial weights are never scored"


def trajectory(make, make_trainer, make_evaluation, digits, *averaging):
    trail, network = Trail(), with_batchnorm()
    module = make(network=network, sensitivity=Table())
    trainer = make_trainer(*averaging, trail, make_evaluation(), max_epochs=3)
    trainer.fit(module, digits())
    return trail, module.sensitivity.upsilon()


def test_training_its_attack_and_upsilon_see_the_current_weights(digits, make, make_trainer, make_evaluation):
    """The trajectory, which depends on each of them, is that of a run without averaging."""
    run = partial(trajectory, make, make_trainer, make_evaluation, digits)
    (plain, upsilon), (averaged, other) = run(), run(ExponentialAveraging(0.9))
    assert len(plain.raw) == 10
    assert all(same(one, two) for one, two in zip(plain.raw, averaged.raw, strict=True))
    assert all(same(one, two) for one, two in zip(averaged.raw[:-1], averaged.seen, strict=True))
    assert other == upsilon


class Spy(PGD):
    """PGD that remembers the weights that it attacked."""

    def __call__(self, network, *others, **options):
        self.seen = [*getattr(self, "seen", []), weights(network)]
        return super().__call__(network, *others, **options)


def test_the_attack_in_training_is_given_the_current_weights(digits, make, make_trainer):
    spy, trail = Spy(loss="kl", steps=1), Trail()
    make_trainer(ExponentialAveraging(0.9), trail, max_epochs=2).fit(make(attack=spy), digits())
    assert len(spy.seen) == 6
    assert all(same(one, two) for one, two in zip(spy.seen, trail.raw[:-1], strict=True))


@pytest.mark.parametrize("last", [True, False])
def test_attacks_in_validation_are_given_the_average(
    last, digits, make, make_trainer, make_evaluation, network, tmp_path
):
    averaging, evaluation, trail = ExponentialAveraging(0.9), make_evaluation(), Trail(tmp_path)
    order = [evaluation, trail, averaging] if last else [averaging, evaluation, trail]
    module, data = make(), digits()
    trainer = make_trainer(*order)
    trainer.fit(module, data)
    images = data.images("val")

    def outside(state):
        network.load_state_dict(state)
        attacks = [evaluation.pointwise, evaluation.distributional]
        batches = [(images.images.float() / 255, images.labels)]
        records = wdat.evaluate(network, batches, module.threat, attacks, losses=["ce"])
        return records[0].upsilon, [r.loss_mean for r in records]

    found = evaluation.last[0].upsilon, [r.loss_mean for r in evaluation.last]
    assert found == outside(weights(module.network))
    assert found != outside(trail.raw[-1])


@pytest.mark.parametrize("split", ["validate", "test"])
def test_evaluation_apart_from_training_scores_what_it_is_given(
    split, digits, make, make_trainer, make_evaluation, tmp_path
):
    """Before and after training with the same trainer, and with a checkpoint loaded into the module."""
    averaging, evaluation, trail = ExponentialAveraging(0.9), make_evaluation(), Trail(tmp_path)
    trainer = make_trainer(averaging, evaluation, trail, max_epochs=2)
    module, data = make(), digits()
    run = partial(getattr(trainer, split), module, data, verbose=False)

    def alone():
        plain = make_evaluation()
        getattr(make_trainer(plain), split)(module, data, verbose=False)
        return [(r.accuracy, r.loss_mean, r.upsilon) for r in plain.last]

    def checked(ckpt_path=None):
        run(ckpt_path=ckpt_path)
        assert [(r.accuracy, r.loss_mean, r.upsilon) for r in evaluation.last] == alone()
        return weights(module.network)

    initial = weights(module.network)
    assert same(checked(), initial)
    trainer.fit(module, data)
    final = weights(module.network)
    assert same(checked(), final)
    average, _, _ = saved(tmp_path / "2.ckpt")
    module.load_state_dict(torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"])
    assert same(checked(), average)
    module.network.load_state_dict(initial)
    assert same(checked(tmp_path / "2.ckpt"), average)


# --- exceptions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def interruptible():
    """Lightning ignores further Ctrl-C after the first one; other tests shouldn't."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("hook", ["train_batch_start", "validation_batch_start", "validation_batch_end",
                                  "validation_epoch_end", "validation_end"])  # fmt: skip
@pytest.mark.parametrize("error", [InterruptedError, KeyboardInterrupt])
@pytest.mark.parametrize("last", [True, False])
def test_after_an_exception_the_module_holds_its_current_weights(
    hook, error, last, digits, make, make_trainer, tmp_path, interruptible
):
    """And the average is saved as such, as it was."""
    averaging, trail = ExponentialAveraging(0.9), Trail(tmp_path / "trail")
    stop = Stop(f"on_{hook}", 6, error, tmp_path / "inside.ckpt")
    order = [trail, stop] if last else [stop, trail]
    order = [*order, averaging] if last else [averaging, *order]
    checkpoint = ModelCheckpoint(tmp_path / "thrown", save_on_exception=True, save_top_k=0)
    module = make(network=with_batchnorm())
    trainer = make_trainer(*order, checkpoint, enable_checkpointing=True, max_epochs=3)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(module, digits())
    assert len(trail.raw) == 7
    assert same(weights(module.network), trail.raw[6])
    (thrown,) = (tmp_path / "thrown").iterdir()
    whole = Trail(tmp_path / "whole")
    make_trainer(ExponentialAveraging(0.9), whole, max_epochs=2).fit(make(network=with_batchnorm()), digits())
    wanted, raw, _ = saved(tmp_path / "whole" / "6.ckpt")
    for path in (thrown, tmp_path / "inside.ckpt"):
        average, current, count = saved(path)
        assert same(average, wanted)
        assert same(current, raw)
        assert count == 7
    assert not same(wanted, raw)


def test_after_an_exception_validation_apart_from_training_scores_the_current_weights(digits, make, make_trainer):
    trail, scored, module = Trail(), Scored(), make(network=with_batchnorm())
    trainer = make_trainer(ExponentialAveraging(0.9), trail, scored, Stop("on_train_batch_start", 3), max_epochs=2)
    with pytest.raises(InterruptedError):
        trainer.fit(module, digits())
    assert not same(scored.ends.pop(3), trail.raw[3])
    trainer.validate(module, digits(), verbose=False)
    assert same(scored.ends[3], trail.raw[3])


def test_a_run_that_broke_off_can_be_started_again_with_the_same_callback(digits, make, make_trainer, tmp_path):
    averaging = ExponentialAveraging(0.9, 0.5)
    with pytest.raises(InterruptedError):
        make_trainer(averaging, Stop("on_validation_batch_end", 3), max_epochs=2).fit(make(), digits())
    found, wanted = Trail(tmp_path / "found"), Trail(tmp_path / "wanted")
    for each, trail in ((averaging, found), (ExponentialAveraging(0.9, 0.5), wanted)):
        module = make(network=with_batchnorm())
        make_trainer(each, trail, max_epochs=2).fit(module, digits())
    for step in range(1, 7):
        mine, theirs = (saved(trail.folder / f"{step}.ckpt") for trail in (found, wanted))
        assert same(mine[0], theirs[0])
        assert mine[2] == theirs[2] == step + 1


# --- checkpoints ----------------------------------------------------------------------------------------------------


def run(make, make_trainer, digits, folder, *others, start=0.5, epochs=3, **options):
    """A run that saves what it has at its end; the saved content, and the network's final weights."""
    last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = make_trainer(
        *others, ExponentialAveraging(0.9, start), last, enable_checkpointing=True, max_epochs=epochs
    )
    module = make(network=with_batchnorm(), sensitivity=Table(), schedule=lambda t: 1 - 0.9 * t)
    trainer.fit(module, digits(), **options)
    return saved(folder / "last.ckpt"), weights(module.network)


@pytest.mark.parametrize("start", [0, 0.5])
@pytest.mark.parametrize(("hook", "steps"), [  # at the end of an epoch of three steps, in its validation, in the next
    ("on_train_batch_end", 3), ("on_validation_batch_end", 3), ("on_train_batch_end", 4), ("on_train_batch_end", 5),
])  # fmt: skip
def test_a_resumed_run_equals_an_uninterrupted_one(hook, steps, start, digits, make, make_trainer, tmp_path):
    """To the bit: the average, the current weights and the number of updates; though the callback saves first."""
    one = partial(run, make, make_trainer, digits, start=start)
    (average, current, count), final = one(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        one(tmp_path / "stopped", Stop(hook, steps, path=tmp_path / "stopped.ckpt"))
    found, resumed = one(tmp_path / "resumed", ckpt_path=tmp_path / "stopped.ckpt")
    assert same(found[0], average)
    assert same(found[1], current)
    assert found[2] == count == 10
    assert same(resumed, final)
    assert same(final, average)
    assert not same(current, average)


def test_what_is_saved_before_the_first_step_of_a_resumed_run_is_what_it_resumed_from(
    digits, make, make_trainer, tmp_path
):
    """No step is counted twice, though the first file was written before the callback had its turn."""
    one = partial(run, make, make_trainer, digits, tmp_path, start=0)
    first, again = tmp_path / "first.ckpt", tmp_path / "again.ckpt"
    with pytest.raises(InterruptedError):
        one(Stop("on_train_batch_end", 4, path=first))
    with pytest.raises(InterruptedError):
        one(Stop("on_train_start", 4, path=again), ckpt_path=first)
    old, new = saved(first), saved(again)
    assert same(old[0], new[0])
    assert same(old[1], new[1])
    assert old[2] == new[2] == 5


def test_a_finished_run_that_is_resumed_ends_with_the_average_again(digits, make, make_trainer, tmp_path):
    one = partial(run, make, make_trainer, digits)
    (average, current, _), _ = one(tmp_path)
    found, resumed = one(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert same(resumed, average)
    assert same(found[1], current)


def test_a_longer_run_keeps_an_average_that_has_started(digits, make, make_trainer, tmp_path):
    """Of 6 steps it starts after 3, of 18 after 9: the step at which the first run stops."""
    one = partial(run, make, make_trainer, digits, tmp_path)
    one(epochs=2)
    stop = Stop("on_train_batch_end", 8, path=tmp_path / "longer.ckpt")
    with pytest.raises(InterruptedError):
        one(stop, epochs=6, ckpt_path=tmp_path / "last.ckpt")
    average, current, _ = saved(tmp_path / "longer.ckpt")
    assert not same(average, current)


def test_a_longer_run_starts_at_its_own_share(digits, make, make_trainer, tmp_path):
    """Stopped after 3 of 9 steps, before the average starts at 4; of 18 steps it starts after 9."""
    one = partial(run, make, make_trainer, digits, tmp_path)
    with pytest.raises(InterruptedError):
        one(Stop("on_train_batch_end", 3, path=tmp_path / "short.ckpt"))
    trail = Trail(tmp_path)
    one(trail, epochs=6, ckpt_path=tmp_path / "short.ckpt")
    started = {step: not same(*saved(tmp_path / f"{step}.ckpt")[:2]) for step in range(4, 19)}
    assert started == {step: step > 9 for step in range(4, 19)}


def test_the_network_reads_the_average_from_the_checkpoint(digits, make, make_trainer, tmp_path, network):
    module, trail = make(), Trail(tmp_path)
    make_trainer(ExponentialAveraging(0.9), trail, max_epochs=2).fit(module, digits())
    models.load_checkpoint(network, tmp_path / "6.ckpt")
    average, current, _ = saved(tmp_path / "6.ckpt")
    assert same(weights(network), average)
    assert same(weights(network), weights(module.network))
    assert not same(average, current)
    content = torch.load(tmp_path / "6.ckpt", weights_only=True)
    assert {"state_dict", "current_model_state", "averaging_state", "sensitivity"} <= set(content)
    assert content["state_dict"].keys() == content["current_model_state"].keys()


def test_after_training_a_checkpoint_holds_the_average_alone(digits, make, make_trainer, tmp_path):
    trainer, module = make_trainer(ExponentialAveraging(0.9)), make()
    trainer.fit(module, digits())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    content = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert "current_model_state" not in content
    assert same(content["state_dict"], weights(module))


def test_what_the_module_has_beside_weights_is_not_copied(digits, make, make_trainer):
    """Such as a progress display, which holds a lock, and the adversarial images of the last step."""

    class Display:
        def __init__(self):
            self.lock = threading.Lock()

        def report(self, label, done, total):
            pass

    module = make()
    module.report = Display().report
    averaging = ExponentialAveraging(0.9)
    for _ in range(2):  # the second time there is a last attack
        make_trainer(averaging).fit(module, digits())
    assert module.last_attack is not None
