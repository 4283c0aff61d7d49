"""What the user wrote: knobs, presets and how they are read. Paper: imports no torch."""
