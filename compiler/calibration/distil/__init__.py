"""Weights trained so that a graph gives what the original does: what is healed, and what learns to choose tokens."""
