"""What moves experts on one rank. Read in this order:

1. versions: what a layer's lanes hold, from the oldest version in use to the newest; all else follows from it;
2. pool: the slots, and which of them are free;
3. pins: the forwards and backwards that use a version;
4. table: the device copy of the current version, which kernels read;
5. resident: one layer's share of a rank, made of the four;
6. events, handoff: a published version on its way to the main thread, and its flip;
7. communicator: how records travel between ranks;
8. fill: one wave: take slots, fill them, publish, grace.

`eplb.gate` orders forwards and flips over streams and threads.
"""
