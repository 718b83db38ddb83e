"""Replays a load trace through policies: `python -m eplb.simulate`."""
