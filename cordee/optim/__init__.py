"""Gradients after they are agreed: `run_schedule`, `clip`, `muon`, `inspect_groups` (who is updated
by what).

The learning rate by experiment: `comparison_text` (what noise lets one tell), `run_search` (the
experiment)."""
