"""The run itself: what a worker builds, steps, evaluates, saves and reports."""
