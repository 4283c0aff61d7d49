"""From a command to ranks that run: the run's folder, its data, its processes and hosts."""
