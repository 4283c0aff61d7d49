"""Data: one fixed order of rows for any number of ranks, and the folder that holds the tokens.

Read in this order: `order` (which row is taken when; paper), `source` (the dataset folder),
`builtin` (two corpora that every machine has), `prepare` (files in, folder out), `loader`
(tensors out).
"""
