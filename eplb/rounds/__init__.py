"""How the workers of all ranks stay together: numbered rounds of a few integers.

protocol (what a round changes; pure) → messages (what the long rounds carry) → exchange (how ranks hear each other).
"""
