"""The command line: one file a verb; paper verbs never import torch."""
