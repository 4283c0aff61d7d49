"""Gradients after they are agreed: `schedule`, `clip`, `muon`, `groups` (who is updated by what).

The learning rate by experiment: `compare` (what noise lets one tell), `search` (the experiment)."""
