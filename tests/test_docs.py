"""The pages: what they tell a reader to type composes and runs, what they link to exists."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from matplotlib import image
from omegaconf import OmegaConf
from PIL import Image
from sampled import sampled
from script_runner import run_script
from torch.utils.data import DataLoader, TensorDataset

import wdat
from wdat.attacks import ATTACKS
from wdat.data import digits
from wdat.data.batch import Batch
from wdat.evaluation import details
from wdat.losses import LOSSES
from wdat.models import LOCAL, load_network, zoo
from wdat.objectives import total
from wdat.records import Record, read

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(f.relative_to(ROOT)): f for f in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))
}
SCRIPTS = ("train.py", "evaluate.py")
FENCE = re.compile(r"(?:^\*\*(?P<title>[^*\n]+)\*\*\n\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S)

EVALUATION = "evaluation.attack_options"
QUICK = [
    "trainer.accelerator=cpu", "trainer.devices=1", "trainer.check_val_every_n_epoch=1", "trainer.max_epochs=1",
    "pretrain.max_epochs=1", "evaluation.curve=[]", "attack.steps=2", "data.batch_size=16",
    f"{EVALUATION}.pgd.steps=2", f"{EVALUATION}.wpgd.steps=2", f"{EVALUATION}.wpgd.loss=ce",
    "data.limit_train=64", "data.limit_val=20", "data.limit_test=25",
]  # fmt: skip
QUICK_EVALUATION = ["attacks=[pgd,wpgd]", "losses=[ce]", "attack_options.pgd.steps=2", "attack_options.wpgd.steps=2"]


@dataclass(frozen=True)
class Block:
    """A fenced block: what stands in bold before it, its language and its text."""

    title: str
    language: str
    body: str


def blocks(page):
    return [Block(m["title"] or "", m["language"], m["body"]) for m in FENCE.finditer(PAGES[page].read_text("utf-8"))]


def prose(page):
    """The page without its fenced blocks."""
    return FENCE.sub("", PAGES[page].read_text("utf-8"))


def files(page):
    """What the page tells its reader to write, by name."""
    return {b.title: b.body for b in blocks(page) if b.title.startswith("my/")}


def commands(page):
    """Command lines in blocks without a language, and in the prose; not those that are cut short."""
    lines = [line for b in blocks(page) if not b.language for line in b.body.replace("\\\n", " ").splitlines()]
    lines += [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose(page))]
    start = re.compile(r"(\w+=\S+ )*(python|torchrun|make) ")
    return [" ".join(line.split()) for line in lines if start.match(line) and "…" not in line]


# --- a folder of one's own -----------------------------------------------------------------------------------------


def forget():
    """Leave no trace of the folder `my` in this process."""
    for name in [n for n in sys.modules if n == "my" or n.startswith("my.")]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The reader's folder: `my/` as the pages have it, and the working directory."""
    folder = tmp_path_factory.mktemp("reader")
    for page in PAGES:
        for name, text in files(page).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setenv("HYDRA_FULL_ERROR", "0")
        forget()
        yield folder
    forget()


# --- what is typed -------------------------------------------------------------------------------------------------


def variants(words):
    """The arguments without what needs a finished run; of a sweep the first combination and the last."""
    flags = [w for w in words if w.startswith("-") and w not in ("-m", "--multirun")]
    assert all("=" in flag for flag in flags), "write flags as --flag=value"
    flags = [re.sub(r"^(--config-dir=)(?!my/)", rf"\1{ROOT}/", flag) for flag in flags]
    typed = [w for w in words if not w.startswith("-") and not w.startswith("resume=")]
    choices = []
    for override in OverridesParser.create().parse_overrides(typed):
        swept = override.sweep_string_iterator() if override.is_sweep_override() else None
        choices.append([f"{override.get_key_element()}={v}" for v in swept] if swept else [override.input_line])
    for overrides in {tuple(choice[end] for choice in choices) for end in (0, -1)}:
        yield [*flags, *overrides]


def check_composed(config):
    """Every name that only a run would look up is one."""
    instantiate(config.threat)
    model = config.model
    if model._target_.endswith("load_network"):
        importlib.import_module(model._target_.rpartition(".")[0])
        assert model.name in LOCAL or zoo.resolve(model.name, model.dataset, model.threat_model)
    instantiate(config.data)
    if "attacks" in config:
        assert set(config.attacks) <= set(ATTACKS)
        assert set(config.losses) <= set(LOSSES)
        return
    for group in ("attack", "objective", "sensitivity"):
        instantiate(config[group])


TYPED = sorted({(page, command) for page in PAGES for command in commands(page)})


@pytest.mark.parametrize(("page", "command"), sampled(TYPED, 4), ids=[f"{Path(p).stem}: {c}" for p, c in TYPED])
def test_commands_name_what_exists(page, command, own):
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if words[0] == "torchrun":
        words = ["python", *(w for w in words[1:] if not w.startswith("-"))]
    assert words[0] == "python"
    if words[1] == "-m":
        module = words[2].split(".")
        file = ROOT.joinpath(*module).with_suffix(".py")
        assert file.is_file() or importlib.util.find_spec(words[2]), words[2]
        return
    assert (ROOT / words[1]).is_file(), words[1]
    if words[1] in SCRIPTS:
        for arguments in variants(words[2:]):
            shown = run_script(ROOT / words[1], *arguments, "--cfg=job")
            assert (shown.status, shown.err) == (0, ""), shown.err
            check_composed(OmegaConf.create(shown.out))


# --- what is linked ------------------------------------------------------------------------------------------------


def anchors(file):
    """GitHub's names of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text("utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_exist(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))
    for target in targets:
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), target


@pytest.mark.parametrize("page", [p for p in PAGES if p.startswith("docs/")])
def test_files_named_in_the_prose_exist(page):
    for name in re.findall(r"`((?:conf|tests|results|docs|wdat|benchmarks)/[\w./-]*)`", prose(page)):
        assert (ROOT / name).exists(), name


def test_the_map_of_the_code_has_every_part():
    (rows,) = re.findall(r"^\| where \| what \|\n\| --- \| --- \|\n((?:\|.*\n)+)", prose("CONTRIBUTING.md"), re.M)
    named = [name for row in rows.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    parts = [name for name in named if "." not in name and "/" not in name]
    package = [file for file in (ROOT / "wdat").iterdir() if file.suffix == ".py" or (file / "__init__.py").exists()]
    assert sorted(parts) == sorted(file.stem for file in package if file.stem != "__init__")
    assert all((ROOT / name).exists() for name in set(named) - set(parts))


def test_the_index_has_every_page():
    index = PAGES["docs/README.md"].read_text("utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index


def script(name):
    """A script of the pages, as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_of_the_docs", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_made_from_committed_records():
    for file, text in script("front").pages():
        assert file.read_text("utf-8") == text, "another table: python -m docs.front"


def test_the_readme_is_short():
    assert len(PAGES["README.md"].read_text("utf-8").splitlines()) <= 120


@pytest.mark.long
def test_figures_are_made_from_committed_records(tmp_path):
    made = script("figures").draw(tmp_path)
    assert {f.name for f in made} <= {f.name for f in DOCS.glob("*.png")}
    shown = " ".join(page.read_text("utf-8") for page in PAGES.values())
    for file in made:
        assert f"{file.name})" in shown
        fresh, committed = image.imread(file)[..., :3], image.imread(DOCS / file.name)[..., :3]
        assert fresh.shape == committed.shape
        assert fresh.std() == pytest.approx(committed.std(), rel=0.1), "another picture: python -m docs.figures"


# --- what a report's fields mean -----------------------------------------------------------------------------------


def test_every_field_of_a_record_is_explained():
    text = prose("docs/report.md")
    known = {f.name for f in fields(Record)} | set(re.findall(r"^\| `(\w+)` \|", details.__doc__, re.M))
    assert len(known) > 30
    rows = re.findall(r"^\| (`[^|]+`) \|", text, re.M)
    assert known <= {name for row in rows for name in re.findall(r"`(\w+)`", row)}


# --- what the pages say, done --------------------------------------------------------------------------------------


def words_of(command):
    """The script and its arguments."""
    return shlex.split(command)[1], shlex.split(command)[2:]


@pytest.fixture(scope="module")
def pictures(own):
    """Class folders, as `docs/extend.md` wants them."""
    data = digits()
    for split, x, y in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
        for i in range(120):
            file = own / "pictures" / split / f"class{int(y[i])}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x[i].permute(1, 2, 0).numpy()).resize((40, 48)).save(file)
    return own / "pictures"


@pytest.fixture(scope="module")
def followed(own, pictures):
    """Every command of `docs/extend.md` in its order, at the smallest size; by command what came of it."""
    momentum, mart = importlib.import_module("my.momentum"), importlib.import_module("my.mart")
    counted = {"momentum": 0, "mart": 0}

    def count(kind, method, key):
        original = getattr(kind, method)

        def wrapper(*arguments):
            counted[key] += 1
            return original(*arguments)

        setattr(kind, method, wrapper)

    count(momentum.Momentum, "_run", "momentum")
    count(mart.MART, "__call__", "mart")
    outcomes, folder = {}, None
    listed = [c for b in blocks("docs/extend.md") if not b.language for c in b.body.replace("\\\n", "").splitlines()]
    for number, command in enumerate(c for c in listed if c.startswith("python ")):
        script, arguments = words_of(command.replace("FOLDER", str(pictures)).replace("RUN_DIR", str(folder)))
        resumed = any(a.startswith("resume=") for a in arguments)
        before = dict(counted)
        if not resumed:
            folder_now = own / f"run{number}"
            arguments += [*(QUICK if script == "train.py" else QUICK_EVALUATION), f"hydra.run.dir={folder_now}"]
            folder = folder_now if script == "train.py" else folder
        else:
            folder_now = folder
            arguments.append("trainer.max_epochs=2")
        result = run_script(ROOT / script, *arguments)
        assert result.status == 0, result.err[-2000:]
        config = OmegaConf.load(folder_now / ".hydra" / "config.yaml")
        calls = {key: counted[key] - before[key] for key in counted}
        key = " ".join(command.split())
        outcomes[key] = SimpleNamespace(
            script=script, resumed=resumed, config=config, calls=calls, err=result.err,
            records=read(folder_now / "records.json"),
        )  # fmt: skip
    return outcomes


EXTEND = [" ".join(c.split()) for c in commands("docs/extend.md") if c.startswith("python ")]


@pytest.mark.long
@pytest.mark.parametrize("command", EXTEND)
def test_extending(followed, command):
    run = followed[command]
    assert run.err == ""
    stages = {r.stage for r in run.records}
    assert stages == ({"before", "epoch", "after"} if run.script == "train.py" else {"evaluate"})
    assert all(0 <= r.accuracy <= 1 and r.network == "small_cnn" for r in run.records)
    own_data = "data=folders" in command or run.resumed
    assert {r.data for r in run.records} == {"folders" if own_data else "digits"}
    assert {r.n for r in run.records if r.split == "test"} == {25 if run.script == "train.py" else 120}
    attacked = {r.attack for r in run.records}
    own_attacks = "evaluation.attacks" in command
    usual = ("wpgd", "knapsack") if run.script == "train.py" else ("wpgd",)
    assert attacked == {"none", "pgd", *(("momentum",) if own_attacks else usual)}
    if run.script == "train.py":
        assert (run.calls["momentum"] > 0) == ("attack=momentum" in command or run.resumed)
        assert (run.calls["mart"] > 0) == ("objective=mart_w" in command or run.resumed)
        assert (run.config.attack._target_ == "my.momentum.Momentum") == ("attack=momentum" in command or run.resumed)
        assert {r.epoch for r in run.records if r.stage == "epoch"} == ({1, 2} if run.resumed else {1})


@pytest.fixture
def problem():
    """A network, a loader and one batch."""
    data = digits()
    x, y = data.x_test[:24].float() / 255, data.y_test[:24]
    network = load_network("small_cnn")
    return SimpleNamespace(network=network, loader=[(x[:16], y[:16]), (x[16:], y[16:])], x=x, y=y)


def test_an_attack_of_ones_own_from_python(own, problem):
    (snippet,) = [b.body for b in blocks("docs/extend.md") if b.title == "in Python"]
    scope = dict(vars(problem))
    exec(snippet.replace('Momentum(loss="redlr")', 'Momentum(loss="redlr", steps=3)'), scope)
    assert [r.attack for r in scope["records"]] == ["none", "wpgd", "momentum"]
    assert all(isinstance(r, wdat.Record) and r.distance <= 0.1 * (1 + 1e-5) for r in scope["records"])
    assert scope["records"][2].options["decay"] == 0.9


def test_the_attack_of_the_page_is_wpgd_budget_without_momentum(own, problem):
    momentum = importlib.import_module("my.momentum").Momentum
    for p, norm in ((2, "linf"), (2, "l2"), (float("inf"), "linf")):
        threat = wdat.ThreatModel(p=p, norm=norm, delta=0.1)
        plain = wdat.attack(problem.network, problem.x, problem.y, threat, "wpgd_budget", steps=3, step_size=0.5)
        same = momentum(decay=0.0, steps=3, step_size=0.5)(problem.network, problem.x, problem.y, threat)
        torch.testing.assert_close(same.x_adv, plain.x_adv)
    other = momentum(steps=3, step_size=0.5)(problem.network, problem.x, problem.y, wdat.ThreatModel(2, "l2", 0.1))
    plain = wdat.attack(problem.network, problem.x, problem.y, other.threat, "wpgd_budget", steps=3, step_size=0.5)
    assert not torch.equal(other.x_adv, plain.x_adv)


def test_the_objective_of_the_page_is_mart(own, problem):
    """Against the formula of Wang et al. 2020, written with probabilities."""
    x_w = (problem.x + 0.1).clamp(0, 1)
    clean, attacked = problem.network(problem.x).double(), problem.network(x_w).double()
    p, q, rows = clean.softmax(1), attacked.softmax(1), torch.arange(len(problem.y))
    true = q[rows, problem.y]
    q_others = q.clone()
    q_others[rows, problem.y] = 0
    boosted = (-true.log() - (1.0001 - q_others.max(1).values).log()).mean()
    weighted = ((p * (p / q).log()).sum(1) * (1 - p[rows, problem.y])).mean()
    context = SimpleNamespace(logits=lambda: problem.network(problem.x), distributional=lambda with_logits: x_w)
    batch = Batch(problem.x, problem.y, rows, rows, len(rows), 0)
    terms = importlib.import_module("my.mart").MART(beta=5.0)(problem.network, batch, context)
    torch.testing.assert_close(total(terms).double(), boosted + 5 * weighted, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_robustbench_loads_an_export(own):
    """In a process of its own, in which nothing else has imported robustbench."""
    (snippet,) = [b.body for b in blocks("docs/zoo.md") if b.language == "python"]
    build, _, load = snippet.partition("network.load_state_dict")
    made = build + 'torch.save(network.state_dict(), "Rebuffi2021Fixing_R18_ddpm-wdat.pt")\n'
    command = [sys.executable, "-W", "ignore", "-c", f"{made}network.load_state_dict{load}import autoattack.state"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=own, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_from_python(problem):
    (snippet,) = [b.body for b in blocks("README.md") if b.language == "python"]
    scope = dict(vars(problem))
    exec(snippet.replace('"knapsack"', '"wfgsm"'), scope)
    assert scope["result"].x_adv.shape == problem.x.shape
    assert {r.attack for r in scope["records"]} == {"none", "pgd", "wpgd", "wfgsm"}


def test_the_callback_in_a_module_of_ones_own(own, problem, monkeypatch):
    (snippet,) = [b.body for b in blocks("docs/lightning.md") if b.language == "python"]

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = problem.network.train()

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    monkeypatch.chdir(own)
    quiet = (
        "L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, "
        "accelerator='cpu', "
    )
    loader = DataLoader(TensorDataset(problem.x, problem.y), 16)
    scope = {"module": Module(), "train_loader": loader, "val_loader": loader}
    exec(snippet.replace("L.Trainer(", quiet), scope)
    logged = {f"val/{name}" for name in re.findall(r"`val/(\w+)`", prose("docs/lightning.md"))}
    assert set(scope["trainer"].callback_metrics) == logged
    assert {r.attack for r in wdat.load_records("robustness.json")} == {"none", "pgd", "wpgd", "knapsack"}


@pytest.mark.long
def test_fine_tuning_ones_own(own):
    """Own architecture, own weights, own images, last layer only, as `docs/fine-tune.md` has it."""
    (snippet,) = [b.body for b in blocks("docs/fine-tune.md") if b.language == "python" and "savez" in b.body]
    data = digits()
    arrays = {
        f"x_{s}": x[:100].permute(0, 2, 3, 1).numpy() for s, x in (("train", data.x_train), ("test", data.x_test))
    }
    arrays |= {f"y_{s}": y[:100].numpy() for s, y in (("train", data.y_train), ("test", data.y_test))}
    exec(snippet, arrays)
    torch.save(importlib.import_module("my.network").Tiny(10).state_dict(), "FILE.pt")
    (command,) = [c for c in commands("docs/fine-tune.md") if "model=custom" in c and "=my" in c]
    script, arguments = words_of(command)
    (images,) = [c for c in commands("docs/fine-tune.md") if c.startswith("python train.py") and "data=npz" in c]
    arguments += [a for a in words_of(images)[1] if a.startswith("data")]
    small = [a for a in QUICK if not a.startswith("pretrain")]
    result = run_script(ROOT / script, *arguments, *small, "data.val_size=0.2", "finetune=head", "hydra.run.dir=tiny")
    assert (result.status, result.err) == (0, "")
    records = read(Path("tiny/records.json"))
    assert {(r.network, r.data, r.stage) for r in records} == {
        ("my.network.Tiny", "npz:FILE", s) for s in ("before", "epoch", "after")
    }
    assert "head.weight, head.bias" in result.out
    assert np.isfinite([r.accuracy for r in records]).all()
