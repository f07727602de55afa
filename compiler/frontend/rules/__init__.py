"""Lift rules: what a run of small operations is, as one operation. A rule knows shapes of programs, never models."""
