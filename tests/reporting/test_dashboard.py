"""What a run shows in W&B, TensorBoard and CSV: the same metrics, and beside them tables, pictures and files."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf
from sampled import sampled
from script_runner import run_script

import wdat
from sweeps import wandb_file
from wdat.errors import Stopped
from wdat.records import RecordFile
from wdat.reporting import dashboard
from wdat.reporting.dashboard import METRICS, configuration, examples
from wdat.reporting.frame import paired, to_frame
from wdat.training.callbacks import AttackLog
from wdat.training.loggers import TensorBoardLogger, WandbLogger

SCRIPT = Path(__file__).parents[2] / "train.py"
EVALUATION = "evaluation.attack_options"
SHORT = [
    "experiment=quickstart", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.check_val_every_n_epoch=1",
    "attack.steps=2", "evaluation.curve=[0.5]", "pretrain.max_epochs=0", "data.batch_size=32", "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1", f"{EVALUATION}.pgd.steps=2", f"{EVALUATION}.wpgd.steps=2",
    "data.limit_train=64", "data.limit_val=10", "data.limit_test=12", "objective=combined",
    "objective.pointwise_attack.steps=1",
]  # fmt: skip
CONTRACT = [  # written out once more, as it was agreed
    "train/loss", "train/loss_clean", "train/loss_pointwise", "train/loss_distributional", "train/upsilon",
    "train/radius_max", "train/top1_share", "train/zero_radii",
    "val/acc_clean", "val/acc_pointwise", "val/acc_wpgd", "val/acc_knapsack", "val/acc_distributional",
    "val/upsilon", "val/distance",
    "test/acc_clean", "test/acc_pointwise", "test/acc_wpgd", "test/acc_knapsack", "test/acc_distributional",
    "test/upsilon", "test/distance",
    "cost/seconds_per_step", "cost/images_per_second",
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("wandb")


@pytest.fixture
def offline(monkeypatch, home):
    """W&B without network, and without anything in the user's own folders."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(home))


@pytest.fixture(scope="module")
def records():
    """Of a small network before and after; the details as a test during training writes them."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    loader = [(torch.rand(9, 3, 4, 4), torch.arange(9) % 3)]
    threat = wdat.ThreatModel(2, "linf", "8/255")
    found = []
    for stage in ("before", "after"):
        found += wdat.evaluate(network, loader, threat, ["pgd", "wpgd"], stage=stage, pictures=True)
        found += wdat.evaluate(network, loader, threat, ["pgd"], stage="epoch", split="val")
    return found


# --- content --------------------------------------------------------------------------------------------------------


def test_the_names_of_the_metrics_are_those_of_the_contract():
    assert [f"{group}/{name}" for group, names in METRICS.items() for name in names] == CONTRACT


def test_the_table_has_every_measurement_before_and_after(records):
    found = paired(to_frame(records))
    assert found[["attack", "threat", "budget"]].to_numpy().tolist() == [
        ["clean", "", ""], ["PGD (CE)", "pointwise", "8/255"], ["W-PGD (CE)", "W₂", "8/255"],
    ]  # fmt: skip
    for row, old, new in zip(found.to_dict("records"), records[:3], records[5:8], strict=True):
        assert (row["before"], row["before_low"], row["before_high"]) == (
            old.accuracy, old.accuracy_low, old.accuracy_high,
        )  # fmt: skip
        assert (row["after"], row["change"]) == (new.accuracy, new.accuracy - old.accuracy)
        assert (row["delta"], row["images"]) == (old.delta, 9)


def test_a_stage_that_was_not_measured_is_left_empty(records):
    found = paired(to_frame([r for r in records if r.stage == "before"]))
    assert found[["after", "after_low", "after_high", "change"]].isna().all(axis=None)
    assert found["before"][0] == records[0].accuracy


@pytest.mark.parametrize("in_memory", [True, False])
def test_examples_are_of_the_last_stage_with_pictures_radii_and_predictions(records, tmp_path, in_memory):
    results = RecordFile(None if in_memory else tmp_path / "records.json")
    results.add(records)
    found = examples(results.records, tmp_path)
    assert found["attack"].tolist() == ["PGD (CE)"] * 6 + ["W-PGD (CE)"] * 6
    pixels = np.asarray(found["picture"][0], dtype=float)
    assert pixels.shape == (4, 14, 3), "three pictures and two gaps"
    assert found["classes"].str.fullmatch("[012] → [012]").all()
    assert found["radius"][0] == "8/255"
    shown = 255 * float(found["distance"][0].removesuffix("/255")) / 255
    assert np.abs(pixels[:, :4] - pixels[:, 5:9]).max() == pytest.approx(shown, abs=1)
    assert examples([r for r in records if r.stage == "epoch"], tmp_path).empty


def test_the_configuration_is_resolved_but_for_the_environment(monkeypatch):
    monkeypatch.setenv("WDAT_SECRET", "hunter2")
    cfg = OmegaConf.create(
        {"seed": 3, "of": "${seed}", "path": "${oc.env:WDAT_SECRET}/x", "again": ["${path}"], "key": "???",
         "folder": "${hydra:runtime.output_dir}", "logger": {
             "api_key": "abc", "Password": "def", "token": None, "tokens": ["ghi"], "credentials": {"user": "me"}}}
    )  # fmt: skip
    found = configuration(cfg)
    assert "hunter2" not in str(found)
    assert found == {
        "seed": 3, "of": 3, "path": "${oc.env:WDAT_SECRET}/x", "again": ["${oc.env:WDAT_SECRET}/x"], "key": None,
        "folder": "${hydra:runtime.output_dir}",
        "logger": {
            "api_key": "***", "Password": "***", "token": None, "tokens": ["***"], "credentials": {"user": "***"}
        },
    }  # fmt: skip


class FakeRun:
    id = "abc"

    def __init__(self):
        self.config, self.logged, self.axes, self.artifacts = {}, [], {}, {}
        self.config = SimpleNamespace(update=lambda values, allow_val_change: self.__dict__.update(values=values))

    def log(self, values):
        self.logged.append(values)

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log_artifact(self, artifact, aliases=()):
        self.artifacts[artifact.name] = (artifact.type, artifact.files, list(aliases))


class FakeArtifact:
    def __init__(self, name, type):  # noqa: A002 (W&B's own name)
        self.name, self.type, self.files = name, type, []

    def add_file(self, path, name):
        assert Path(path).exists()
        self.files.append(name)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """`fake(**options)` is a logger whose run is kept in memory, and the run."""
    module = SimpleNamespace(
        Settings=lambda **_: None, Table=lambda **values: SimpleNamespace(**values),
        Image=lambda source: ("image", source), Artifact=FakeArtifact,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", module)

    def make(**options):
        logger = WandbLogger(tmp_path, offline=True, **options)
        logger._experiment = run = FakeRun()
        return logger, run

    return make


def test_wandb_gets_configuration_and_axes_at_the_start(fake):
    logger, run = fake()
    dashboard.begin([logger], OmegaConf.create({"seed": 1, "model": {"name": "${seed}"}}))
    assert run.values == {"seed": 1, "model": {"name": 1}}
    assert set(run.axes) == set(CONTRACT)
    assert (run.axes["val/upsilon"], run.axes["cost/seconds_per_step"]) == ("epoch", "trainer/global_step")


@pytest.mark.parametrize("log_checkpoint", [False, True])
def test_wandb_gets_tables_picture_and_files_at_the_end(fake, records, tmp_path, log_checkpoint):
    logger, run = fake(log_checkpoint=log_checkpoint)
    for name in ("records.json", "report.html", "curve.png", "best.ckpt"):
        (tmp_path / name).touch()
    dashboard.finish([logger], records, tmp_path, tmp_path / "best.ckpt", 7)
    (shown,) = run.logged
    assert shown.pop("trainer/global_step") == 7
    assert shown.pop("results/accuracy_against_budget") == ("image", str(tmp_path / "curve.png"))
    assert shown["results/before_after"].dataframe.equals(paired(to_frame(records)))
    table = shown["results/adversarial_examples"]
    assert len(table.data) == 12
    assert table.data[0][table.columns.index("picture")][0] == "image"
    wanted = {"results-abc": ("results", ["records.json", "report.html", "curve.png"], [])}
    if log_checkpoint:
        wanted["checkpoint-abc"] = ("model", ["best.ckpt"], ["best"])
    assert run.artifacts == wanted


def test_a_run_without_pictures_shows_its_table(fake, records, tmp_path):
    logger, run = fake(log_checkpoint=True)
    dashboard.finish([logger], [r for r in records if r.attack == "none"], tmp_path, None, 0)
    assert set(run.logged[0]) == {"results/before_after", "trainer/global_step"}
    assert list(run.artifacts) == ["results-abc"]


def test_processes_other_than_the_first_show_nothing(fake, records, tmp_path, monkeypatch):
    logger, run = fake()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    dashboard.begin([logger], OmegaConf.create({}))
    dashboard.finish([logger], records, tmp_path, None, 0)
    assert (run.logged, run.axes, run.artifacts) == ([], {}, {})


@pytest.mark.filterwarnings("default")  # tensorboard's own
def test_tensorboard_gets_the_same_as_images_and_text(records, tmp_path):
    from matplotlib import image

    image.imsave(tmp_path / "curve.png", np.zeros((5, 7, 3)))
    logger = TensorBoardLogger(tmp_path, name="", version="tensorboard")
    dashboard.begin([logger], OmegaConf.create({"seed": 5}))
    dashboard.finish([logger], records, tmp_path, None, 7)
    found = events(tmp_path)
    assert set(found.Tags()["images"]) == {"results/accuracy_against_budget", "results/adversarial_examples"}
    (sheet,) = found.Images("results/adversarial_examples")
    assert (sheet.width, sheet.height, sheet.step) == (14, 48, 7)
    text = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert "seed: 5" in text["configuration/text_summary"]
    assert text["results/before_after/text_summary"].count("\n") == 5
    assert "classes" in text["results/adversarial_examples/text_summary"]


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


# --- whole runs -----------------------------------------------------------------------------------------------------


def train(*arguments, folder="run"):
    return run_script(SCRIPT, *SHORT, f"hydra.run.dir={folder}", *arguments)


def only(folder):
    """The only run of W&B in a folder, read back after its service has written all of it and ended."""
    sys.modules["wandb"].teardown()
    (file,) = Path(folder).rglob("*.wandb")
    return wandb_file.read(file)


@pytest.mark.filterwarnings("default")  # wandb's own
def test_an_offline_run_of_wandb_holds_everything(offline, home, tmp_path, monkeypatch):
    monkeypatch.setenv("WDAT_SECRET", "hunter2")
    found = train("logger=wandb", "logger.log_checkpoint=true", "+note='${oc.env:WDAT_SECRET}'")
    assert (found.status, found.err) == (0, "")
    run = only("run")
    names = set().union(*run.history)
    assert set(CONTRACT) <= names
    assert {name.split("/")[0] for name in names if not name.startswith("_")} == {
        *METRICS, "epoch", "results", "trainer",
    }  # fmt: skip
    assert run.config["threat"]["delta"] == 0.1
    assert (run.config["seed"], run.config["note"]) == (0, "${oc.env:WDAT_SECRET}")
    assert (run.metrics["val/acc_clean"], run.metrics["test/acc_clean"]) == ("epoch", "trainer/global_step")
    last = {key: row for row in run.history for key in row}
    for key, kind in {
        "before_after": "table",
        "adversarial_examples": "table",
        "accuracy_against_budget": "image",
    }.items():
        assert last[f"results/{key}/_type"][f"results/{key}/_type"] == f"{kind}-file"
    (media,) = Path("run").rglob("before_after*.table.json")
    assert [row[0] for row in json.loads(media.read_text())["data"]] == [
        "clean",
        *["PGD (CE)", "W-PGD (ReDLR)", "knapsack"] * 2,
    ]
    pictures = [files for kind, files in run.artifacts.values() if kind == "run_table" and len(files) > 1]
    assert len(pictures[0]) > 12, "the table and its pictures"
    kept = {kind: files for kind, files in run.artifacts.values() if kind != "run_table"}
    assert kept["results"] == ["curve.png", "records.json", "report.html"]
    assert kept["model"] == ["best.ckpt"]
    assert run.exit_code == 0
    for folder in (tmp_path / "run" / "wandb", home):
        assert not any(b"hunter2" in file.read_bytes() for file in folder.rglob("*") if file.is_file())


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # wandb's own
def test_a_run_kept_on_this_machine_says_once_how_to_upload_it(offline):
    found = train("logger=wandb")
    (folder,) = Path("run/wandb").glob("offline-run-*")
    assert found.out.count("wandb sync") == 1
    assert found.out.rstrip().endswith(f"wandb sync {folder.resolve()}")


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # tensorboard's own
def test_csv_and_tensorboard_have_the_same_names():
    assert train(folder="csv").status == train("logger=tensorboard", folder="tb").status == 0
    with Path("csv/metrics/metrics.csv").open(newline="") as lines:
        assert {*CONTRACT, "epoch", "step"} == set(next(csv.reader(lines)))
    assert {*CONTRACT, "epoch"} == set(events(Path("tb")).Tags()["scalars"])
    assert "<html" in Path("csv/report.html").read_text()


@pytest.mark.filterwarnings("default")  # wandb's own
@pytest.mark.parametrize(
    ("fault", "status"),
    sampled([(Stopped(15, "stopped"), 143), (RuntimeError("broken"), 1), (KeyboardInterrupt(), 1)], 3),
)
def test_a_run_that_breaks_is_finished_with_status_1(offline, monkeypatch, fault, status):
    def fail(*_):
        raise fault

    monkeypatch.setattr(AttackLog, "on_train_batch_end", fail)
    found = train("logger=wandb")
    assert found.status == status, found.err  # 1 after Ctrl-C is Lightning's
    run = only("run")
    assert run.exit_code == 1
    assert "test/acc_clean" in set().union(*run.history)
    assert sys.modules["wandb"].run is None
    assert found.out.count("wandb sync") == 1


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # wandb's own
def test_each_job_of_a_sweep_has_its_own_run_in_one_group(offline):
    found = run_script(SCRIPT, "-m", *SHORT, "logger=wandb", "seed=0,1", "hydra.sweep.dir=sweeps/by_seed")
    assert (found.status, found.err) == (0, "")
    for job in (0, 1):
        run = only(f"sweeps/by_seed/{job}")
        assert (run.run.display_name, run.run.run_group) == (f"by_seed-{job}", "sweeps/by_seed")
        assert (run.config["seed"], run.exit_code) == (job, 0)
        assert set(CONTRACT) <= set().union(*run.history)
    assert found.out.count("wandb sync") == 2


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    import wandb

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "none"))
    wandb.teardown()  # it remembers the environment that it saw first
    yield
    wandb.teardown()


@pytest.mark.filterwarnings("default")  # wandb's own
def test_without_a_login_nothing_is_trained_and_the_ways_out_are_named(no_login):
    found = train("logger=wandb")
    assert (found.status, found.out) == (2, "")
    assert found.err == (
        "error: logger=wandb needs a login to W&B, and there is none: log in with `wandb login`, set "
        "WANDB_MODE=offline to keep the run on this machine, or use logger=csv\n"
    )
    assert not Path("run/records.json").exists()


@pytest.mark.filterwarnings("default")  # wandb's own
def test_a_login_that_can_not_be_used_is_refused_and_not_shown(no_login, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "much too short")
    found = train("logger=wandb")
    assert found.status == 2
    assert "W&B can't use the login that it finds" in found.err
    assert "logger=csv" in found.err
    assert "Traceback" not in found.err
    assert "much too short" not in found.err
