"""Data: one fixed order of rows for any number of ranks, and the folder that holds the tokens."""
