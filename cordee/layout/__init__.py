"""Who holds what: axes, splits and the table of tensors. Paper: imports no torch."""
