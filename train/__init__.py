"""The run: configuration, trainer, checkpoints, export, inference and evaluation."""
