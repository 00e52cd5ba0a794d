"""Runs a script of the project inside the test process, where warnings are errors."""

from __future__ import annotations

import contextlib
import io
import logging
import runpy
import sys
from types import SimpleNamespace

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig


def contents(folder):
    """Files below a folder with what they hold, and the folders that are empty."""
    found = [f for f in folder.rglob("*") if f.is_file() or not any(f.iterdir())]
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in found}


def run_script(script, *arguments):
    """`python SCRIPT *arguments` in this process: its status, output and error output."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    root = logging.getLogger()
    handlers, level, status = root.handlers[:], root.level, 0
    loud = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    sys.argv = [str(script), *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as left:
        status = left.code
    finally:
        sys.argv = argv
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        for name, old in loud.items():
            logging.getLogger(name).setLevel(old)
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())
