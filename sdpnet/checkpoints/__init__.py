"""Checkpoints and models on the disk, and how a training is continued from them."""
