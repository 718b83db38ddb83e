"""What moves experts on one rank.

pool (slots) → table (which slots kernels read) → resident (one layer's versions) → fill (one wave: fill, publish, free) →
communicator (how records travel) → events (the handoff to the main thread).
"""
