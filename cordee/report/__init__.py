"""What a run tells: the meter and sinks that record it, and the pages and pictures made of that."""
