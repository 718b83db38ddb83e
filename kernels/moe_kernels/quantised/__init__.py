"""Experts of fewer bits: rows and weights in FP8, weights in 4 bits."""
