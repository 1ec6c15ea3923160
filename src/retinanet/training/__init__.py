"""Training: a loop that reads from top to bottom, and a state that survives a kill at any time."""
