"""Signals during training, and when `last.ckpt` is written."""

from __future__ import annotations

import copy
import os
import signal

import lightning as L
import pytest
import torch
from sampled import product

from wdat.errors import SettingError, Stopped
from wdat.training.callbacks import GracefulStop, LastCheckpoint
from wdat.training.requests import Requests


class Send(L.Callback):
    """Sends a signal to this process before a step, or in the evaluation of an epoch."""

    def __init__(self, number, step=None, epoch=None, times=1):
        self.number, self.step, self.epoch, self.times = number, step, epoch, times

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)

    def on_validation_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            os.kill(os.getpid(), self.number)


class Seen(L.Callback):
    """What happened, in order."""

    def __init__(self):
        self.happened = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.happened.append(trainer.global_step)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.happened.append("validation")


@pytest.fixture
def fresh(make_module, network):
    """A module with a network of its own."""
    return lambda: make_module(network=copy.deepcopy(network))


def fit(fresh, make_trainer, data, path, *more, ckpt=None):
    seen, module = Seen(), fresh()
    trainer = make_trainer(seen, *more, GracefulStop(path, "RUN"), max_epochs=2, max_steps=-1)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    return module, seen.happened


def weights(module):
    return module.network.state_dict()


@pytest.mark.parametrize(
    ("number", "at"),
    product([signal.SIGTERM, signal.SIGINT], [{"step": 1}, {"step": 2}, {"step": 4}, {"epoch": 0}], every=3),
)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(number, at, digits, fresh, make_trainer, tmp_path):
    """In the first epoch, in its last step, in the second, and in the evaluation between (three steps an epoch)."""
    whole, everything = fit(fresh, make_trainer, digits(), tmp_path / "whole.ckpt")
    path, handlers = tmp_path / "last.ckpt", [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    seen = Seen()
    trainer = make_trainer(seen, Send(number, **at), GracefulStop(path, "RUN"), max_epochs=2, max_steps=-1)
    with pytest.raises(Stopped, match=rf"stopped by {number.name} after step \d; saved last\.ckpt.*resume=RUN") as stop:
        trainer.fit(fresh(), digits())
    assert stop.value.number == number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    resumed, rest = fit(fresh, make_trainer, digits(), tmp_path / "again.ckpt", ckpt=path)
    assert seen.happened + rest == everything == [1, 2, 3, "validation", 4, 5, 6, "validation"]
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[key]), key


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(number, digits, make_module, make_trainer, tmp_path):
    trainer = make_trainer(
        Send(number, step=1, times=2), GracefulStop(tmp_path / "last.ckpt", "RUN"), max_epochs=2, max_steps=-1
    )
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(
        Stopped, match=f"stopped by {number.name} at once; nothing was saved yet: start .* again"
    ) as stop:
        trainer.fit(make_module(), digits())
    assert stop.value.number == number
    assert not (tmp_path / "last.ckpt").exists()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_the_last_checkpoint_is_written_each_epoch_and_by_the_clock_but_never_after_a_last_step_alone(
    digits, make_module, make_trainer, tmp_path
):
    saved = []

    class Note(LastCheckpoint):
        def _save(self, trainer):
            super()._save(trainer)
            saved.append((trainer.global_step, trainer.is_last_batch))

    path = tmp_path / "last.ckpt"
    make_trainer(Note(path, minutes=0), enable_checkpointing=True, max_epochs=2, max_steps=-1).fit(
        make_module(), digits()
    )
    assert saved == [(1, False), (2, False), (3, True), (4, False), (5, False), (6, True)]
    saved.clear()
    make_trainer(Note(path, minutes=None), enable_checkpointing=True, max_epochs=2, max_steps=-1).fit(
        make_module(), digits()
    )
    assert saved == [(3, True), (6, True)]
    assert torch.load(path, weights_only=True)["global_step"] == 6


def test_negative_minutes_are_named():
    with pytest.raises(SettingError, match=r"callbacks\.last_checkpoint\.minutes=-1"):
        LastCheckpoint("last.ckpt", minutes=-1)


class Told(L.LightningModule):
    """Its steps carry what another process asks for."""

    def __init__(self, *asked):
        super().__init__()
        self.weight, self.asked = torch.nn.Parameter(torch.zeros(())), asked

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(len(self.asked), 1))

    def training_step(self, batch, batch_idx):
        return {"loss": self.weight.square(), "requests": frozenset(self.asked[batch_idx])}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_process_does_what_another_asks_for_without_a_sum_of_its_own(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("wdat.distributed.Processes.max", lambda self, value: pytest.fail("a sum of its own"))
    saved, requests = [], Requests()

    class Note(LastCheckpoint):
        def _save(self, trainer):
            saved.append(trainer.global_step)

    callbacks = (Note(tmp_path / "last.ckpt", requests=requests), GracefulStop(tmp_path / "last.ckpt", "RUN", requests))
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 3") as stop:
        make_trainer(*callbacks, enable_checkpointing=True).fit(Told([], ["save"], ["SIGTERM"], []))
    assert stop.value.number == signal.SIGTERM
    assert saved == [2]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_the_clock_and_a_signal_ask_all_processes(digits, make_module, make_trainer, tmp_path):
    requests, taken = Requests(), []

    class Take(L.Callback):
        def on_train_batch_end(self, *_):
            taken.append(requests.taken())

    callbacks = (
        LastCheckpoint(tmp_path / "last.ckpt", minutes=0, requests=requests), Send(signal.SIGINT, step=1), Take(),
        GracefulStop(tmp_path / "last.ckpt", "RUN", requests),
    )  # fmt: skip
    with pytest.raises(Stopped):
        make_trainer(*callbacks, enable_checkpointing=True).fit(make_module(), digits())
    assert taken == [[1, 0, 0], [1, 1, 0]]
