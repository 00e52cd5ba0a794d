"""A run's metrics: one file, folder or W&B run, however often it is stopped, as if it had never been."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from wdat.errors import RunError, SettingError
from wdat.training import loggers
from wdat.training.checkpointing import steps
from wdat.training.loggers import CSVLogger, MetricsFile, TensorBoardLogger, WandbLogger, own_run, read_rows

ROOT = Path(__file__).parents[2]
STEPS = 5  # of an epoch


class Counts(L.LightningModule):
    """Logs the step it is in, what it has learnt by then, and on epoch 1 something that no epoch had before."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, index):
        self.log("train/step", float(self.global_step))
        self.log("train/weight", self.weight.detach().item())
        self.log("cost/seconds", float(torch.rand(())))
        return (self.weight * batch.sum()).sum()

    def validation_step(self, batch, index):
        self.log("val/weight", self.weight.detach().item())
        if self.current_epoch:
            self.log("val/late", 1.0)

    def test_step(self, batch, index):
        self.log("test/weight", self.weight.detach().item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(STEPS, 1))

    val_dataloader = test_dataloader = train_dataloader


class Interrupted(Exception):  # noqa: N818 (not an error)
    pass


class Save(L.Callback):
    """Saves after the given number of steps, inside an epoch or at its end, and stops some steps later."""

    def __init__(self, path, at, stop):
        self.path, self.at, self.stop = path, at, stop

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.at and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, *_):
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.stop:
            raise Interrupted

    def on_test_end(self, trainer, *_):
        if self.stop == "after the test" and trainer.global_step:
            raise Interrupted


def train(folder, *callbacks, logger=CSVLogger, resume=None, epochs=3, every=2):
    """As `train.py` does: a test, training and a test, or from a checkpoint on."""
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, callbacks=list(callbacks),
        logger=logger(folder, resumed_at=steps(resume) if resume else None),
        log_every_n_steps=every, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip
    module = Counts()
    if not resume:
        trainer.test(module, verbose=False)
    trainer.fit(module, ckpt_path=resume)
    trainer.test(module, verbose=False)
    return trainer


def content(folder, leave="cost/"):
    """Every cell of the only file of metrics, but for the columns to leave out."""
    (file,) = folder.rglob("*.csv")
    assert file == folder / "metrics" / "metrics.csv"
    assert [f.name for f in file.parent.iterdir()] == ["metrics.csv"]
    with file.open(newline="") as lines:
        return [{k: v for k, v in row.items() if not k.startswith(leave)} for row in csv.DictReader(lines)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder)
    return content(folder)


def test_the_file_of_a_run(uninterrupted):
    assert list(uninterrupted[0]) == sorted(uninterrupted[0])
    assert {"epoch", "step", "test/weight", "train/step", "train/weight", "val/late", "val/weight"} == {
        *uninterrupted[0]
    }
    found = [(int(row["step"]), [k for k in ("test", "train", "val") if row[f"{k}/weight"]]) for row in uninterrupted]
    trained = [(step, ["train"]) for step in (1, 3, 5, 7, 9, 11, 13)]
    validated = [(STEPS * epoch - 1, ["val"]) for epoch in (1, 2, 3)]
    assert found == [(0, ["test"]), *sorted(trained + validated), (15, ["test"])]
    for row in uninterrupted:
        assert row["train/step"] in ("", f"{row['step']}.0")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    ("at", "stop"),
    [(5, 5), (5, 6), (5, 8), (5, 14), (10, 12), (7, 8), (8, 9), (8, 14), (10, 10), (15, "after the test")],
)
def test_an_interrupted_run_has_the_file_of_an_uninterrupted_one(tmp_path, uninterrupted, at, stop):
    saved = tmp_path / "saved.ckpt"
    with pytest.raises(Interrupted):
        train(tmp_path, Save(saved, at, stop))
    train(tmp_path, resume=saved)
    assert content(tmp_path) == uninterrupted


def test_a_run_may_be_interrupted_again_and_again(tmp_path, uninterrupted):
    saved = [tmp_path / f"{k}.ckpt" for k in (1, 2)]
    with pytest.raises(Interrupted):
        train(tmp_path, Save(saved[0], 5, 9))
    for stop in (5, 8):  # at once, before a row is logged, and later
        with pytest.raises(Interrupted):
            train(tmp_path, Save(saved[1], 10, stop), resume=saved[0])
    with pytest.raises(Interrupted):
        train(tmp_path, Save(saved[1], 10, 13), resume=saved[0])
    train(tmp_path, resume=saved[1])
    assert content(tmp_path) == uninterrupted


def test_a_finished_run_may_be_made_longer(tmp_path, uninterrupted):
    """The rows of its last test go; they are not those of the longer run."""
    saved = tmp_path / "saved.ckpt"
    train(tmp_path, Save(saved, 10, None), epochs=2)
    assert content(tmp_path)[-1]["test/weight"]
    train(tmp_path, resume=saved)
    assert content(tmp_path) == uninterrupted


def test_a_fresh_run_begins_a_new_file(tmp_path, uninterrupted):
    file = tmp_path / "metrics" / "metrics.csv"
    file.parent.mkdir()
    file.write_text("old,step\n1,0\n2,1\n")
    train(tmp_path)
    assert content(tmp_path) == uninterrupted


def test_rows_are_in_the_file_as_soon_as_they_are_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    file = tmp_path / "metrics" / "metrics.csv"
    assert not file.exists()
    for step in range(4):
        logger.log_metrics({"a": step / 8, **({"late": torch.tensor(2.0)} if step == 2 else {})}, step)
        assert [int(row["step"]) for row in read_rows(file)] == list(range(step + 1))
    assert file.read_text() == "a,late,step\n0.0,,0\n0.125,,1\n0.25,2.0,2\n0.375,,3\n"


def test_columns_of_dropped_rows_go_with_them(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("a,gone,step\n1,,0\n,2,5\n")
    writer = MetricsFile(str(tmp_path), 5)
    writer.log_metrics({"a": 3}, 5)
    writer.save()
    assert file.read_text() == "a,step\n1,0\n3,5\n"


@pytest.mark.parametrize("tail", ["0.25,2", "0.25", "0.25,2,3\n", "\n", "x,y\n", "0.5,-1\n", '"0.2'])
def test_a_torn_row_is_dropped(tmp_path, tail):
    file = tmp_path / "metrics.csv"
    file.write_text("a,step\n0.0,0\n0.125,1\n" + tail)
    assert read_rows(file) == [{"a": "0.0", "step": "0"}, {"a": "0.125", "step": "1"}]


@pytest.mark.parametrize("text", ["", "a,st", "a,step\n", "\n"])
def test_a_file_without_rows_has_none(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    assert read_rows(tmp_path / "metrics.csv") == read_rows(tmp_path / "none.csv") == []


def test_figures_that_are_not_finite_are_kept(tmp_path):
    writer = MetricsFile(str(tmp_path))
    for step, value in enumerate((math.nan, math.inf)):
        writer.log_metrics({"a": value}, step)
        writer.save()
    assert [row["a"] for row in read_rows(tmp_path / "metrics.csv")] == ["nan", "inf"]


def test_a_file_that_can_not_be_written_is_named(tmp_path, monkeypatch):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1}, 0)
    monkeypatch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for row in ({"a": 2}, {"b": 2}):
        with pytest.raises(RunError, match=r"metrics\.csv couldn't be written \(No space left"):
            logger.log_metrics(row, 1)


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger, WandbLogger])
def test_processes_other_than_the_first_write_nothing(tmp_path, monkeypatch, logger):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    made = logger(tmp_path, resumed_at=3)
    made.log_metrics({"a": 1.0}, 0)
    made.save()
    made.finalize("success")
    assert list(tmp_path.iterdir()) == []


ENDLESS = """
import sys
from wdat.training.loggers import CSVLogger
logger, step = CSVLogger(sys.argv[1]), 0
while True:
    logger.log_metrics({"a": step, f"column {step // 7}": 1.5}, step)
    print(step, flush=True)
    step += 1
"""


@pytest.mark.long
def test_a_kill_loses_nothing_that_was_logged(tmp_path):
    """Also while the file is written anew for a new column, as in every seventh row here."""
    for rows in (3, 60, 151):
        folder = tmp_path / str(rows)
        command = [sys.executable, "-c", ENDLESS, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            for _ in range(rows):
                process.stdout.readline()
            process.kill()
            last = int((process.stdout.read().splitlines() or [rows - 1])[-1])
        found = [int(row["a"]) for row in read_rows(folder / "metrics" / "metrics.csv")]
        assert found == list(range(len(found)))
        assert last + 1 <= len(found) <= last + 2


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def tensorboard(folder, resumed_at=None):
    return TensorBoardLogger(folder, resumed_at, name="", version="tensorboard")


@pytest.mark.filterwarnings("default")  # tensorboard's own
def test_tensorboard_shows_an_interrupted_run_as_an_uninterrupted_one(tmp_path):
    train(tmp_path / "one", logger=tensorboard)
    saved = tmp_path / "saved.ckpt"
    with pytest.raises(Interrupted):
        train(tmp_path / "two", Save(saved, 5, 9), logger=tensorboard)
    time.sleep(1.1)  # files are read in the order of their names, which begin with the second
    train(tmp_path / "two", logger=tensorboard, resume=saved)
    one, two = (events(tmp_path / name) for name in ("one", "two"))
    for found in (one, two):
        del found["cost/seconds"]
    assert one == two
    assert [step for step, _ in one["train/weight"]] == [1, 3, 5, 7, 9, 11, 13]
    assert [f.name for f in (tmp_path / "two").iterdir()] == ["tensorboard"]


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.filterwarnings("default")  # wandb's own
def test_a_resumed_run_goes_on_in_its_run_of_wandb(tmp_path, no_network):
    import wandb

    def one(folder, resume):
        with own_run():
            resumed_at = 3 if resume else None
            logger = WandbLogger(tmp_path / folder, project="wdat", offline=True, resumed_at=resumed_at)
            logger.log_metrics({"a": 1.0}, 3)
            name = logger.experiment.id
        assert wandb.run is None, "the next job begins its own"
        return name

    first, second, other = one("run", False), one("run", True), one("other", False)
    assert first == second != other
    assert (tmp_path / "run" / "wandb_id.txt").read_text() == f"{first}\n"
    assert one("run", False) != first, "a fresh run in the same folder"
    assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{first}/run-{first}.wandb"))


def test_a_run_that_stopped_before_wandb_had_an_id_takes_a_new_one(tmp_path):
    logger = WandbLogger(tmp_path, project="wdat", offline=True, resumed_at=3)
    assert logger.version is None
    (tmp_path / "wandb_id.txt").write_text("abc\n")
    logger = WandbLogger(tmp_path, project="wdat", offline=True, resumed_at=3)
    assert logger.version == "abc"
    assert (logger._wandb_init["id"], logger._wandb_init["resume"]) == ("abc", "allow")


@pytest.mark.parametrize("status", [0, 1])
def test_a_job_ends_its_run_of_wandb_with_its_status(monkeypatch, status):
    ended = []
    run = SimpleNamespace(settings=SimpleNamespace(mode="online", sync_dir="run"))
    wandb = SimpleNamespace(run=run, finish=lambda exit_code: ended.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    if status:
        with pytest.raises(KeyboardInterrupt), own_run():
            raise KeyboardInterrupt
    else:
        with own_run():
            pass
    assert ended == [status]


def test_only_a_run_on_this_machine_needs_to_be_uploaded(monkeypatch, capsys):
    for mode, said in (("online", ""), ("offline", "W&B run kept on this machine; to upload it: wandb sync 'a run'\n")):
        run = SimpleNamespace(settings=SimpleNamespace(mode=mode, sync_dir="a run"))
        monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=run, finish=lambda exit_code: None))
        with own_run():
            pass
        assert capsys.readouterr().out == said


def test_a_run_that_wandb_refuses_names_the_ways_out(tmp_path, monkeypatch):
    import wandb

    def refuse(**options):
        raise wandb.errors.CommError("no connection")

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(loggers, "_logged_in", lambda: True)
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(SettingError, match=r"\(no connection\): log in .* WANDB_MODE=offline .* logger=csv"):
        WandbLogger(tmp_path, project="wdat").log_metrics({"a": 1.0}, 0)
    assert not (tmp_path / "wandb_id.txt").exists()


def test_an_unknown_mode_of_wandb_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(SettingError, match=r"'ofline' \(WANDB_MODE\): did you mean offline"):
        WandbLogger(tmp_path)


def test_wandb_keeps_its_own_choice_where_nothing_is_set(tmp_path):
    chosen = WandbLogger(tmp_path, offline=True, name=None, group=None, entity="team")._wandb_init
    assert (chosen["name"], chosen["entity"], chosen["mode"]) == (None, "team", "offline")
    assert "group" not in chosen


def test_without_wandb_a_job_just_ends(monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with own_run():
        pass
    assert "wandb" not in sys.modules
