"""What the package says of itself: its version stands in one place, and others repeat it."""

from __future__ import annotations

from importlib.metadata import metadata
from pathlib import Path

from omegaconf import OmegaConf

import wdat

ROOT = Path(__file__).parents[1]


def test_the_citation_has_the_version_and_the_licence():
    cited = OmegaConf.load(ROOT / "CITATION.cff")
    assert cited.version == wdat.__version__
    assert cited.license == metadata("wdat")["License-Expression"]


def test_the_changelog_has_the_version():
    assert f"## [{wdat.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
