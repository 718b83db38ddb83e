"""The demo: experts move between ranks while a small model reads Python's own documentation."""
