"""A callback of Hydra's that keeps what jobs return, as a sweeper that optimises would."""

from __future__ import annotations

from typing import Any

from hydra.experimental.callback import Callback

RETURNED: list[Any] = []


class Keep(Callback):
    """Keeps the figures."""

    def on_job_end(self, config, job_return, **others):
        RETURNED.append(job_return.return_value)
