"""Training: the loop, and a saved state that survives a kill at any time."""
