"""Data flows one way: each part of the package imports only parts to its left."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import wdat

ROOT = Path(wdat.__file__).parent
BASE = ("errors", "seeding", "batch", "processes", "guard")
ORDER = [
    ("errors",),
    (*(part for part in BASE if part != "errors"), "place"),
    ("team",),
    ("threat", "losses", "records"),
    ("gradients", "console"),
    ("sensitivity",),
    ("attacks",),
    ("evaluation",),
    ("objectives",),
    ("module",),
    ("callbacks", "dashboard", "sweep"),
]
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
LEAVES = {  # injected or called from above; each imports these and itself only
    "models": {
        "errors",
        "checkpoints",
        "seeding",
        "batch",
        "records",
        "guard",
        "threat",
        "console",
    },  # its programs print
    "data": {*BASE, "records"},
    "metrics": set(BASE),
    "schedules": set(BASE),
    "optim": set(BASE),
    "resume": {*BASE, "records"},
    "checkpoints": {"errors"},
    "launch": {"errors", "place"},
    "loggers": {"errors"},
}
FILES = sorted(ROOT.rglob("*.py"))


def _part(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


def _imported(file: Path) -> set[str]:
    """The parts of the package that a file imports anywhere, inside functions too; `wdat` for its front."""
    found = set()
    package = ["wdat", *file.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "wdat":
                known = len(parts) > 1 and ((ROOT / parts[1]).is_dir() or (ROOT / f"{parts[1]}.py").is_file())
                found.add(parts[1] if known else "wdat")
    return found


def _allowed(part: str) -> set[str]:
    if part in LEAVES:
        return LEAVES[part]
    left = {other for other, level in LEVEL.items() if level < LEVEL[part]}
    left |= {"console"} if LEVEL[part] >= LEVEL["evaluation"] else set()  # its programs print
    return left | (set(LEAVES) if LEVEL[part] >= LEVEL["module"] else set())


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_left(file):
    part = _part(file)
    if part == "__init__":
        return
    assert part in LEVEL or part in LEAVES, f"{part} has no place in the order"
    assert _imported(file) - {part} <= _allowed(part)


def test_the_reader_sees_every_form_of_import(monkeypatch):
    file = ROOT / "attacks" / "imagined.py"
    text = "import wdat.losses\nfrom wdat import threat\nfrom wdat.data.npz import npz\nfrom .. import records\n"
    text += "from ..models import zoo\nfrom . import base\ndef f():\n    from wdat import attack\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: text)
    assert _imported(file) == {"losses", "threat", "data", "records", "models", "attacks", "wdat"}


def test_some_known_imports_are_found():
    """Guards the guard: an empty reading would pass everything."""
    assert {"attacks", "records", "threat"} <= _imported(ROOT / "evaluation" / "run.py")
    assert "losses" in _imported(ROOT / "gradients.py")
