"""Sweeps: one question a file, for W&B (`wandb/`) and for Hydra alone (`hydra/`); README.md says what each answers."""
