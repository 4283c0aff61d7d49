"""Checkpoints: what is written, when it counts as written, and how state is read back."""
