"""Published token merging as it is described, run by torch on transformers' modules."""

from benchmarks.peers_tokens.tome import tome

__all__ = ["tome"]
