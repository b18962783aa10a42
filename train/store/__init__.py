"""Folders on disk: names, whole-or-absent writing, checkpoints, the hub, who made what."""
