"""What a run will cost on given devices, and which layout is best. Paper: imports no torch."""
