"""The checkpoint that the monitor chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, which works on in a folder that was moved: what it keeps is looked for where the folder is now.

    Lightning forgets the scores of a folder with another name, and the next epoch would replace a better one.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state as it was, in this run's folder."""
        super().load_state_dict({**state_dict, **self._moved(state_dict)})

    def _moved(self, state: dict[str, Any]) -> dict[str, Any]:
        if self.dirpath is None:
            return {}
        folder = Path(self.dirpath)
        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        here = {key: str(folder / Path(state[key]).name) for key in paths if state.get(key)}
        scores = {str(folder / Path(path).name): score for path, score in state["best_k_models"].items()}
        return {"dirpath": self.dirpath, "best_k_models": scores, **here}
