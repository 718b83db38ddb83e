"""Experts → the replica that computes each row; shares of this batch."""
