"""Where experts should be, and the way there. Pure: arrays in, arrays out; imports nothing but NumPy.

placement (which lane holds which expert) → shares (how replicas split an expert's tokens) → balance (how even that is) →
policy (load → the next placement) → waves and plan (the moves, in steps each safe to publish) → rebalance (all layers).
"""
