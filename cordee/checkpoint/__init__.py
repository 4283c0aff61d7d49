"""Checkpoints: what is written, when it counts as written, and how it is read back.

`format` what a checkpoint is, `save` writes one, `load` verifies and reads one. No process talks to
another in here: the caller agrees between ranks, and the files do the rest.
"""
