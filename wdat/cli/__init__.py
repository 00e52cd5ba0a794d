"""The command line: train and evaluate, the folder of a run, and what the terminal shows."""
