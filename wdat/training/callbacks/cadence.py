"""When the trainer logs."""

import lightning as L


def due(trainer: L.Trainer) -> bool:
    """Whether the figures of this step are logged: every `trainer.log_every_n_steps`, and at an epoch's end."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the trainer's logger connector
    return trainer.is_last_batch or trainer.global_step % max(every, 1) == 0
