"""The only door to processes: start, launch, mesh, exchange."""
