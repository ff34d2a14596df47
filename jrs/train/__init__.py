"""Training: data and synthesis, objective, loop."""
