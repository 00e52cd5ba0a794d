"""The site of the documentation is built strictly, and has what its hooks make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_the_site(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ("method", "api/api", "case-study")
    method, api, study = ((tmp_path / "site" / page / "index.html").read_text() for page in names)
    assert "<math" in method
    assert "arithmatex" not in method
    assert "critical radii d*, drawn radii d* U" in study, "stars begin no emphasis"
    assert '<td class="figures">+3.4 [' in study
    for name in ("evaluate", "RobustEvaluation", "nearest_adversarial", "ThreatModel"):
        assert f'.{name}"' in api
