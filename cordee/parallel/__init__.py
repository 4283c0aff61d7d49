"""Inside an island: how one model is cut over its ranks, and how a step's work is run."""
