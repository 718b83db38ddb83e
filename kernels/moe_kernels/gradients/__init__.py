"""Backward of the experts."""
