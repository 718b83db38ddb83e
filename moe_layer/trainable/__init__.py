"""Experts that are parameters: at their owners, with copies in lanes, and gradients back."""
