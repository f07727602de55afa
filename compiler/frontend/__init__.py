"""Capture: any transformers model, or any traceable module, as a lifted graph."""

from compiler.frontend.capture import capture

__all__ = ["capture"]
