"""Rows in the order of their experts, in tiles, and how tiles are read and stored."""
