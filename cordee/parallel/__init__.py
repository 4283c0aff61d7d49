"""Inside an island: one model over its ranks, and the engines that run microbatches on it."""
