"""Training with Lightning: the module, optimisers and schedules, callbacks, loggers and checkpoints."""
