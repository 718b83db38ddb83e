"""The path of a single token."""
