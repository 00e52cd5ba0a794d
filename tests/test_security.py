"""Nothing is unpickled, no name writes HTML or steers a terminal, no path leaves its folder, no secret is written."""

from __future__ import annotations

import ast
import base64
import importlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from script_runner import run_script
from torch import nn

from wdat import records
from wdat.checkpoints import damage
from wdat.console import PlainConsole, before_after, evaluation_table, readable_errors
from wdat.data import cifar
from wdat.data.npz import npz
from wdat.errors import SettingError
from wdat.evaluation import figures, plots
from wdat.evaluation.collect import table
from wdat.evaluation.report import write_report
from wdat.evaluation.session import read_radii
from wdat.models import load_network, zoo
from wdat.records import Record
from wdat.resume import resumed_arguments
from wdat.threat import ThreatModel

ROOT = Path(__file__).parents[1]
TRAIN, EVALUATE = ROOT / "train.py", ROOT / "evaluate.py"
SECRETS = {"WANDB_API_KEY": "secret123" * 4 + "abcd", "WDAT_TEST_TOKEN": "secret456secret456"}
EVALUATION = "callbacks.robust_evaluation"
TRAINED = [
    "experiment=quickstart", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.max_epochs=1", "attack.steps=1",
    "trainer.check_val_every_n_epoch=1", "curve=[]", "pretrain.max_epochs=0", f"{EVALUATION}.pointwise.steps=1",
    f"{EVALUATION}.distributional.steps=1", "data.limit_train=32", "data.limit_val=32", "data.limit_test=32",
]  # fmt: skip
EVALUATED = [
    "model=small_cnn", "device=cpu", "threat.delta=0.002", "losses=[ce]", "attacks=[pgd,knapsack]",
    "attack_options.pgd.steps=1", "attack_options.knapsack.steps=2", "attack_options.knapsack.starts=1",
    "attack_options.knapsack.targets=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written into the checkout; the environment holds secrets and asks for unpickling."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


# --- nothing is unpickled -------------------------------------------------------------------------------------------


class Payload:
    """Would leave a trace when unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture
def trap(tmp_path):
    """`trap(kind, path)` writes a pickle that runs code; `trap.sprung()` says whether it ran."""
    trace = tmp_path / "trace"

    def write(kind, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"state_dict": {"x": torch.zeros(1)}, "args": Payload(trace)}
        if kind == "pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
        return path

    write.object, write.sprung = Payload(trace), trace.exists
    return write


KINDS = ["zip", "legacy", "pickle"]


def test_the_trap_would_spring(trap, tmp_path):
    """Guards the guard."""
    torch.load(trap("zip", tmp_path / "x.pt"), weights_only=False)
    assert trap.sprung()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["network.pt", "last.ckpt", "best.ckpt"])
def test_a_checkpoint_runs_no_code(trap, tmp_path, kind, name):
    with pytest.raises(SettingError, match=r"nothing is unpickled here.*model\.checkpoint"):
        load_network("small_cnn", checkpoint=trap(kind, tmp_path / name))
    assert not trap.sprung()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_resumed_runs_no_code(trap, tmp_path, kind):
    assert damage(trap(kind, tmp_path / "best.ckpt"))
    run = tmp_path / "run"
    for name in ("last.ckpt", "last.previous.ckpt", "best.ckpt"):
        trap(kind, run / "checkpoints" / name)
    (run / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(TRAINED), run / ".hydra" / "overrides.yaml")
    result = run_script(TRAIN, f"resume={run}")
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    assert "last.ckpt can't be used" in result.err
    assert not trap.sprung()


@pytest.mark.parametrize("kind", KINDS)
def test_flips_that_were_kept_run_no_code(trap, tmp_path, kind):
    file = trap(kind, tmp_path / "run" / "flips_linf.pt")
    result = run_script(EVALUATE, *EVALUATED, "data=digits", "data.limit_test=8", f"hydra.run.dir={file.parent}")
    assert not trap.sprung()
    assert result.status == 2, result.err
    assert "flips_linf.pt" in result.err
    assert "Traceback" not in result.err


@pytest.fixture
def zoo_entry(monkeypatch):
    """`zoo_entry(name, constructor)` adds a network to RobustBench's dictionary; nothing can be downloaded."""
    zoo.robustbench()
    networks = importlib.import_module("robustbench.model_zoo.cifar10").linf
    asked = []
    monkeypatch.setattr("robustbench.utils.download_gdrive_new", lambda *a: asked.append(a))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *a, **k: asked.append(a))

    def add(name, constructor=lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))):
        monkeypatch.setitem(networks, name, {"model": constructor, "gdrive_id": "the-id"})
        return name

    add.asked = asked
    return add


@pytest.mark.parametrize("kind", KINDS)
def test_the_zoos_weights_run_no_code(trap, tmp_path, zoo_entry, kind):
    trap(kind, tmp_path / "cifar10" / "Linf" / "Tiny2024.pt")
    with pytest.raises(SettingError, match=r"nothing is unpickled here.*model\.root"):
        load_network(zoo_entry("Tiny2024"), root=tmp_path)
    assert not trap.sprung()
    assert not zoo_entry.asked


def test_timms_weights_run_no_code(trap, tmp_path, zoo_entry, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    trap("zip", tmp_path / "hub" / "checkpoints" / "debenedetti2022light-xcit-s-cifar10-linf.pth.tar")
    with pytest.raises(SettingError, match="nothing is unpickled here"):
        load_network("Debenedetti2022Light_XCiT-S12", root=tmp_path)
    assert not trap.sprung()
    assert not zoo_entry.asked


def test_constructors_of_the_zoo_run_no_code(trap, tmp_path, zoo_entry):
    """torchvision's and timm's loaders ask for unpickling; files in their caches are as little trusted as others."""
    file = trap("zip", tmp_path / "cache.pth")
    asks = zoo_entry("Asks2024", lambda: torch.load(file, weights_only=False))
    for checkpoint in (None, file):
        (tmp_path / "cifar10" / "Linf").mkdir(parents=True, exist_ok=True)
        torch.save({}, tmp_path / "cifar10" / "Linf" / "Asks2024.pt")
        with pytest.raises(SettingError, match="Asks2024"):
            load_network(asks, root=tmp_path, checkpoint=checkpoint)
        assert not trap.sprung()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1", "as it was"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_images_and_radii_run_no_code(trap, tmp_path):
    poison = np.array([trap.object, trap.object], dtype=object)
    file, single = tmp_path / "x.npz", tmp_path / "x.npy"
    np.savez(file, **dict.fromkeys(("x_train", "y_train", "x_test", "y_test", "radii"), poison))
    np.save(single, poison)
    for path in (file, single, trap("pickle", tmp_path / "p.npz"), trap("zip", tmp_path / "z.npz")):
        with pytest.raises(SettingError, match=re.escape(f"data.path={path}")):
            npz(path)
        with pytest.raises(SettingError, match=re.escape(f"certified={path}")):
            read_radii(path, 2)
    assert not trap.sprung()


def test_cifars_files_are_opened_only_if_they_are_the_published_ones(trap, tmp_path, monkeypatch):
    """They are pickles, which torchvision reads: by their published checksums, or not at all."""
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        trap("pickle", tmp_path / "cifar-10-batches-py" / name)
    with pytest.raises(SettingError, match=r"wrong checksum.*data\.download"):
        cifar.cifar10(tmp_path, download=False)
    monkeypatch.setattr(cifar, "fetch", lambda *_: None)  # as if they were exchanged after the first look
    with pytest.raises(SettingError, match=r"data\.root"):
        cifar.cifar10(tmp_path, download=False)
    assert not trap.sprung()


UNSAFE = {
    "pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "builtins.eval", "eval",
    "exec", "builtins.exec", "compile", "__import__", "yaml", "os.system", "os.popen", "os.exec", "os.spawn", "pty",
    "torch.jit.load", "torch.hub.load", "torch.package", "torch.distributed.all_gather_object", "pandas.read_pickle",
    "torch.distributed.broadcast_object_list", "torch.distributed.gather_object", "torch.serialization",
    "torch.distributed.recv_object_list", "torch.distributed.scatter_object_list", "numpy.lib.format",
}  # fmt: skip
HARMLESS = {"pickle.UnpicklingError", "yaml.safe_load", "yaml.YAMLError"}
NEEDED = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}


def unsafe(text):
    """What a program uses that can run what it reads, or that would if it were told so."""
    tree = ast.parse(text)
    known = {name: name for name in ("eval", "exec", "compile", "__import__")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def full(node):
        if isinstance(node, ast.Attribute):
            inner = full(node.value)
            return inner and f"{inner}.{node.attr}"
        return known.get(node.id) if isinstance(node, ast.Name) else None

    found, called, inner = [], {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called[node.func] = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if isinstance(node, ast.Attribute):
            inner.add(node.value)
    for node in ast.walk(tree):
        name = full(node) if isinstance(node, (ast.Attribute, ast.Name)) and node not in inner else None
        if not name:
            continue
        given = called.get(node)
        parts = name.split(".")
        if name in NEEDED:
            key, value = NEEDED[name]
            bad = given is None or given.get(key) is not value
        else:
            bad = any(".".join(parts[:k]) in UNSAFE for k in range(1, len(parts) + 1)) and name not in HARMLESS
            bad |= bool(re.match(r"os\.(exec|spawn)", name)) or (given or {}).get("shell", False) is not False
        found += [name] if bad else []
    return found


PROGRAMS = sorted([*ROOT.glob("wdat/**/*.py"), *ROOT.glob("benchmarks/**/*.py"), TRAIN, EVALUATE])


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_program_reads_what_could_run(file):
    assert unsafe(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(f)", "import torch as t\nt.load(f, weights_only=False)", "eval(x)", "exec(x)",
        "f = eval", "from torch import load\nload(f)", "import torch\nread = torch.load",
        "import pickle\npickle.load(f)",
        "import torch\ntorch.load(f, weights_only=flag)", "from pickle import loads\nloads(b)",
        "import numpy as np\nnp.load(f)", "import numpy\nnumpy.load(f, allow_pickle=1)", "import os\nos.system(c)",
        "import subprocess\nsubprocess.run(c, shell=True)", "import yaml\nyaml.load(f)", "import os\nos.execv(a, b)",
        "import marshal\nmarshal.loads(f)", "import torch.distributed as dist\ndist.all_gather_object(a, b)",
        "from torch import distributed as d\nd.gather_object(a)",
    ],
)  # fmt: skip
def test_the_reader_of_programs_sees_what_is_unsafe(text):
    assert unsafe(text)


def test_the_reader_of_programs_passes_what_is_safe():
    text = "import torch, numpy as np, pickle, subprocess\ntorch.load(f, weights_only=True)\nnetwork.eval()\n"
    text += "np.load(f, allow_pickle=False)\nexcept_ = pickle.UnpicklingError\nsubprocess.run(['git'], shell=False)"
    assert unsafe(text) == []


def test_configurations_name_only_classes_that_read_no_pickles():
    """And take nothing from the environment, which would be written into `.hydra`."""
    for file in (ROOT / "conf").rglob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        for target in re.findall(r"_target_:\s*(\S+)", text):
            assert target.startswith(("wdat.", "lightning.", "torch.optim.")), file
        assert "oc.env" not in text, file


# --- a folder to resume holds data, not programs --------------------------------------------------------------------

FOREIGN = [
    "model._target_=torch.load", "+callbacks.x={_target_:os.system,command:ls}", "--config-dir=/tmp", "-m",
    "hydra.searchpath=[file:///tmp]", "hydra/launcher=x", "+hydra.job.env_set.A=b", "data=../../tmp/evil",
    "+experiment=../x", "data=/tmp/evil", "data='${seed}'", "experiment=[quickstart,../x]", "++hydra.run.dir=/tmp",
]  # fmt: skip


def test_every_group_of_configurations_is_known_to_resume():
    assert set(importlib.import_module("wdat.resume").GROUPS) == {
        p.name for p in (ROOT / "conf").iterdir() if p.is_dir()
    }


def test_resuming_writes_no_value_of_the_environment_down(tmp_path):
    (tmp_path / ".hydra").mkdir()
    said = ["model.checkpoint='${oc.env:WANDB_API_KEY}'", "deltas=['${threat.delta}']"]
    (tmp_path / ".hydra" / "overrides.yaml").write_text("".join(f"- {json.dumps(line)}\n" for line in said))
    assert resumed_arguments([f"resume={tmp_path}"], ())[:2] == said


@pytest.mark.parametrize("override", FOREIGN)
def test_a_resumed_folder_brings_no_code_of_its_own(tmp_path, override):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text(f"- data=digits\n- {json.dumps(override)}\n")
    with pytest.raises(SettingError, match=r"resume=.*overrides\.yaml.*command line"):
        resumed_arguments([f"resume={tmp_path}"], ())
    repeated = resumed_arguments([f"resume={tmp_path}", override], ())
    assert repeated.count(override) == 1, "what the user writes is the user's"


@pytest.mark.parametrize(
    "override", ["data.path=../x.npz", "certified=../radii.npy", "model.checkpoint=/a/b.pt", "~logger", "seed=3",
                 "+trainer.limit_train_batches=2", "deltas=[2/255,8/255]", "attack_options={wpgd:{steps:3}}"],
)  # fmt: skip
def test_ordinary_settings_are_resumed(tmp_path, override):
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create([override]), tmp_path / ".hydra" / "overrides.yaml")
    assert resumed_arguments([f"resume={tmp_path}"], ())[0] == override


# --- no name writes HTML --------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script>\"'&"
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
CLEAN = Record(
    stage="evaluate", network="net", checkpoint="", data="digits", split="test", attack="none", options={}, loss="ce",
    p=2.0, norm="linf", delta=0.0, n=100, set_size=100, accuracy=0.8, accuracy_low=0.7, accuracy_high=0.9,
    loss_mean=1.0, distance=0.0, seconds=0.1, seed=0, device="cpu", commit="abc", versions={"torch": "2"}, upsilon=10.0,
    loss_misclassified=3.0,
)  # fmt: skip
EXAMPLE = {"image": PNG, "moved": PNG, "change": PNG, "label": 3, "prediction": 5, "radius": 0.1}
WPGD = replace(
    CLEAN, attack="wpgd", delta=0.04, accuracy=0.446, accuracy_low=0.4, accuracy_high=0.5, upsilon=None, distance=0.04,
    loss_misclassified=None, loss_mean=1.2, options={"steps": 3},
    details={"histogram": {"edges": [0.0, 0.05, 0.1], "counts": [70.0, 30.0]}, "examples": [EXAMPLE],
             "bound": "upper", "critical_distance": 0.08, "curve": [[0.0, 0.8], [0.02, 0.5]], "moved": 52,
             "effort": [[100, 0.35], [200, 0.29]]},
)  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def check(self):
        """Nothing here runs, and nothing is fetched."""
        for tag, attributes in self.tags:
            assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form", "foreignobject")
            for name, value in attributes.items():
                assert not name.startswith("on")
                assert "alert" not in (value or "")
                if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                    assert value.startswith(("#", "data:image/png;base64,"))
                if value and value.startswith("data:"):
                    content = base64.b64decode(value.partition(",")[2], validate=True)
                    assert content.startswith(b"\x89PNG")
        policy = [a["content"] for t, a in self.tags if t == "meta" and "http-equiv" in a]
        assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
        return self


def page_of(found, folder):
    """The report of records that were written and read again."""
    records.write(folder / "records.json", found)
    write_report(records.read(folder / "records.json"), folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8")).check()


TEXTS = ["network", "checkpoint", "data", "split", "attack", "loss", "norm", "device", "commit"]


def test_the_page_of_harmless_records_passes(tmp_path):
    page = page_of([CLEAN, WPGD], tmp_path)
    assert sum(tag == "img" for tag, _ in page.tags) == 3


@pytest.mark.parametrize("name", [HOSTILE, "\"><img src=x onerror='alert(1)'>", "]]></svg><script>alert(1)</script>"])
def test_no_name_writes_html(tmp_path, name):
    changed = dict.fromkeys(TEXTS, name)
    options, versions = {name: name, "steps": name}, {name: name}
    own = replace(WPGD, **changed, options=options, versions=versions)
    page = page_of([replace(CLEAN, **{**changed, "attack": "none"}), own, replace(own, options={"steps": 2})], tmp_path)
    text = "".join(page.words)
    for said in (f"{name}, {name} {name}, 100 images, {name}", f"steps={name}", f"{name} {name}"):
        assert said in text, said


@pytest.mark.parametrize("where", ["attack", "loss", "norm"])
def test_no_name_in_a_figure_writes_html(tmp_path, where):
    """Each alone, so that every figure is drawn."""
    page = page_of([CLEAN, replace(WPGD, **{where: HOSTILE})], tmp_path)
    assert any(tag == "svg" for tag, _ in page.tags)


@pytest.mark.parametrize(
    "picture",
    [f'{PNG}"><script>alert(1)</script>', f'{PNG}" onerror="alert(1)', "javascript:alert(1)", 3, None, ["x"], "",
     "AAAA", f"{PNG}\n", PNG[:-3], base64.b64encode(b"<svg onload='alert(1)'/>").decode()],
)  # fmt: skip
def test_only_pictures_are_embedded(tmp_path, picture):
    example = {**EXAMPLE, "image": picture, "label": HOSTILE, "prediction": HOSTILE}
    page = page_of([CLEAN, replace(WPGD, details={**WPGD.details, "examples": [example], "moved": HOSTILE})], tmp_path)
    assert sum(tag == "img" for tag, _ in page.tags) == 2


@pytest.mark.parametrize("name", [k for k, v in CLEAN.to_json().items() if isinstance(v, (int, float))])
def test_records_with_text_for_numbers_are_refused(tmp_path, name):
    file = tmp_path / "records.json"
    file.write_text(json.dumps([{**CLEAN.to_json(), name: HOSTILE}]))
    with pytest.raises(SettingError, match=r"records\.json isn't a list of records"):
        records.read(file)


@pytest.mark.parametrize(
    "content", ['[{"stage": []}]', "[" * 100_000, "null", '["x"]', "\x80", "cos\nsystem\n(S'ls'\ntR."]
)
def test_other_json_is_refused(tmp_path, content):
    (tmp_path / "records.json").write_text(content)
    with pytest.raises(SettingError, match="move it away"):
        records.read(tmp_path / "records.json")


def test_a_markdown_table_keeps_its_cells():
    line = table([replace(WPGD, network="a|b\n# c <img src=x> [x](javascript:alert(1))")]).splitlines()[2]
    assert line.startswith(r"| a\|b # c &lt;img src=x> [x]\(javascript:alert(1)) | digits test | wpgd ce, W_2 | ")


# --- no name steers a terminal, none stops a picture ----------------------------------------------------------------

STEERING = "\x1b[2J\x1b]8;;http://x\x07\x9b31m"
ODD = ["[red]x[/red]", "[/]", "[link=http://x]y[/link]", ":bomb:", "\\[x]", f"a{STEERING}b", "a\udcffb", "a\x00b"]


def escapes(text):
    return re.findall(r"\x1b\[[0-9;]*m", text)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("console", [Console, PlainConsole])
def test_tables_show_names_as_they_are(name, console):
    def shown(word):
        changed = dict.fromkeys(("network", "data", "split", "attack", "loss", "norm"), word)
        one, two = replace(CLEAN, network=word, data=word, loss=word), replace(WPGD, **changed)
        out = console(file=io.StringIO(), force_terminal=True, width=400, legacy_windows=False, highlight=False)
        out.print(evaluation_table([one, two]))
        both = [replace(r, stage=stage, split="test") for stage in ("before", "after") for r in (one, two)]
        out.print(before_after(both, [word], 0.04))
        return out.file.getvalue()

    text, plain = shown(name), shown("plain")
    assert sorted(set(escapes(text))) == sorted(set(escapes(plain))), "no colours of its own"
    assert not set("\x07\x9b\x00\udcff") & set(text)
    assert "\x1b[2J" not in text
    assert "\x1b]" not in text
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    assert text.count(safe) == plain.count("plain")


@pytest.mark.parametrize("name", ODD)
def test_lines_and_errors_are_shown_as_they_are(name, capsys):
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    out = PlainConsole(file=io.StringIO(), force_terminal=True)
    out.print(f"{name}: {name} " + 50 * "long ")
    assert out.file.getvalue() == f"{safe}: {safe} " + 50 * "long " + "\n"
    with pytest.raises(SystemExit), readable_errors():
        raise SettingError(f"data.path={name}: no such file")
    assert capsys.readouterr().err == f"error: data.path={safe}: no such file\n"


def test_a_key_of_a_file_steers_nothing(tmp_path, capsys):
    torch.save({f"{STEERING}.weight": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(SystemExit), readable_errors():
        load_network("small_cnn", checkpoint=tmp_path / "x.pt")
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("file", [p for p in PROGRAMS if "benchmarks" not in p.parts], ids=lambda f: f.name)
def test_programs_print_through_the_plain_console(file):
    """Rich's own takes brackets in names and paths for markup. Benchmarks print names of their own."""
    if file == ROOT / "wdat" / "console.py":
        return
    assert not re.search(r"(?<!Plain)Console\(", file.read_text(encoding="utf-8"))


NAMES = ["$\\frac$", "$\\frac", "\\", "_hidden", f"a{STEERING}b\x00\udcff", "用户", "x" * 5000, "\n" * 50]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:9]))
def test_no_name_stops_a_picture(tmp_path, name):
    """Warnings are errors here: a name that is taken for mathematics, for a glyph, or for the room of the axes."""
    changed = dict.fromkeys(("network", "data", "attack", "loss", "norm"), name)
    found = [replace(CLEAN, **{**changed, "attack": "none"}), replace(WPGD, **changed)]
    both = [replace(r, stage=stage) for stage in ("before", "after") for r in found]
    plots.accuracy_against_budget(both, tmp_path / "curve.png")
    plots.save(plots.accuracy_curves(figures.groups(found)[0]), tmp_path / "curve.svg")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert "\x1b" not in (tmp_path / "curve.svg").read_text(encoding="utf-8")


def test_a_page_of_odd_names_can_be_written(tmp_path):
    odd = "a\udcffb" + "x" * 5000
    page_of([replace(CLEAN, network=odd, data=odd, device=odd)], tmp_path)


# --- no path leaves its folder --------------------------------------------------------------------------------------

ESCAPES = ["../../x", "/etc/passwd", "..", "Linf/../../x", "x" * 5000, "a\0b", "", "~no such/x"]


@pytest.mark.parametrize("name", ESCAPES, ids=lambda name: repr(name[:9]))
@pytest.mark.parametrize("key", ["name", "dataset", "threat_model"])
def test_names_of_networks_build_no_paths(tmp_path, name, key):
    settings = {"name": "Rebuffi2021", "root": tmp_path / "root", **{key: name}}
    with pytest.raises(SettingError, match=rf"model\.{key}"):
        load_network(**settings)
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_weights_of_the_whole_zoo_lie_in_their_folder(tmp_path):
    count = 0
    for dataset in zoo.CLASSES:
        for threat_model in zoo.THREAT_MODELS:
            for name in zoo.names(dataset, threat_model):
                entry = zoo.resolve(name, dataset, threat_model)
                for file in zoo.weight_files(entry, tmp_path):
                    count += 1
                    hub = Path(torch.hub.get_dir()) / "checkpoints"
                    assert file.path.parent in (tmp_path / dataset / threat_model, hub)
                    assert file.path.name not in ("", ".", "..")
    assert count > 100


def test_a_name_in_the_zoo_that_is_a_path_is_refused(tmp_path, zoo_entry):
    for name in ("../../x", "/tmp/x"):
        with pytest.raises(SettingError, match=r"model\.name.*outside model\.root"):
            load_network(zoo_entry(name), root=tmp_path / "root")
    assert not zoo_entry.asked
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize(
    "path", ["x" * 5000, "a\0b", "~no such/x", "a\udcffb", "/proc/x", ""], ids=lambda p: repr(p[:9])
)
def test_odd_paths_are_errors_in_our_words(zoo_entry, path):
    reads = {
        r"model\.checkpoint": lambda: load_network("small_cnn", checkpoint=path),
        r"data\.path": lambda: npz(path),
        "certified": lambda: read_radii(Path(path), 3),
        r"data\.root": lambda: cifar.cifar10(path, download=False),
        r"model\.(root|name)": lambda: load_network(zoo_entry("Tiny2024"), root=path),
    }
    for setting, read in reads.items():
        with pytest.raises(SettingError, match=setting):
            read()


@pytest.mark.parametrize("norm", ["../x", "linf/../../x", "/etc"])
def test_norms_in_file_names_are_the_known_ones(norm):
    with pytest.raises(SettingError, match=r"threat\.norm"):
        ThreatModel(2, norm, 0.1)


# --- whole runs: hostile names, secrets in the environment -----------------------------------------------------------


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def holds_a_secret(result, folder):
    """Names of what a run wrote that hold a value of the environment which they shouldn't."""
    written = {**contents(folder), "stdout": result.out.encode(), "stderr": result.err.encode()}
    return [name for name, data in written.items() if any(s.encode() in data for s in SECRETS.values())]


@pytest.fixture
def hostile_images(tmp_path):
    """A file of images whose name is HTML."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), np.arange(40) % 10
    path = tmp_path / "<img src=x onerror=alert(1)>[red].npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    return path


def test_an_evaluation_of_hostile_names_keeps_its_folder_and_its_secrets(tmp_path, hostile_images):
    folder = tmp_path / "a[" / "]b" / "[bold]"
    result = run_script(
        EVALUATE, *EVALUATED, "data=npz", f"data.path='{hostile_images}'", "data.val_size=10", "save_distances=true",
        f"hydra.run.dir='{folder}'",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert str(folder / "report.html") in result.out
    assert hostile_images.stem in result.out
    Page((folder / "report.html").read_text(encoding="utf-8")).check()
    known = {"records.json", "report.html", "curve.png", "evaluate.log", "flips_linf.pt", "distances_linf.npz"}
    hydra = {".hydra/config.yaml", ".hydra/overrides.yaml", ".hydra/hydra.yaml"}
    assert set(contents(folder)) == known | hydra
    assert {p.name for p in tmp_path.iterdir()} == {"here", "a[", hostile_images.name}
    assert not list(Path.cwd().iterdir())
    assert holds_a_secret(result, folder) == []


def test_a_training_keeps_its_folder_and_its_secrets(tmp_path):
    folder = tmp_path / "a[" / "]b"
    result = run_script(TRAIN, *TRAINED, f"hydra.run.dir='{folder}'")
    assert result.status == 0, result.err
    assert str(folder / "records.json") in result.out
    assert holds_a_secret(result, folder) == []
    assert {p.name for p in tmp_path.iterdir()} == {"here", "a["}
    assert not list(Path.cwd().iterdir())


def test_the_search_for_secrets_finds_them(tmp_path):
    """Guards the guard."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x.log").write_text(f"key={SECRETS['WANDB_API_KEY']}")
    said = SimpleNamespace(out=SECRETS["WDAT_TEST_TOKEN"], err="")
    assert holds_a_secret(said, tmp_path) == ["deep/x.log", "stdout"]


@pytest.mark.slow
def test_wandbs_own_files_hold_no_secret(tmp_path):
    """In an interpreter of its own, because W&B starts processes."""
    folder = tmp_path / "run"
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TRAIN), *TRAINED, "logger=wandb", f"hydra.run.dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert any("wandb" in name for name in contents(folder))
    assert holds_a_secret(SimpleNamespace(out=done.stdout, err=done.stderr), folder) == []
    shutil.rmtree(folder)
