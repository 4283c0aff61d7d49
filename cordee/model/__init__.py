"""The transformer and how it starts. Nothing here imports torch.distributed."""
