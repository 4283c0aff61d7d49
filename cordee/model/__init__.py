"""The byte-level transformer and how it starts. Metal: imports torch, never torch.distributed."""
