"""What a run records: the writers of its files, their reader, the screen, and the report."""
