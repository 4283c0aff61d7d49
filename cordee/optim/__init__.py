"""What happens to gradients after they are agreed: clip, schedule, update. Metal.

Read in this order: `schedule` (how fast), `muon` (the one update rule of our own), `clip` (what
gradients and parameters may be), `groups` (who is updated by what).
"""
