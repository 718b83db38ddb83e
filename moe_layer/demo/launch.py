"""Starts the demo's ranks and collects what they recorded."""

import queue
import tempfile
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from moe_layer.demo.serve import Recording, Setup, serve


def launch(setup: Setup, progress: Any) -> list[Recording]:
    """Every rank's recording. A rank that fails ends the run with its traceback."""
    context = mp.get_context("spawn")
    messages = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.spawn(
            _serve_rank, (setup, f"file://{folder}/rendezvous", messages), nprocs=setup.ranks, join=False
        )
        recordings: dict[int, Recording] = {}
        while len(recordings) < setup.ranks:
            try:
                message = messages.get(timeout=1.0)
            except queue.Empty:
                processes.join(timeout=0)  # raises what a rank raised
                continue
            if isinstance(message, int):
                progress.update(message)
            else:
                recordings[message[0]] = message[1]
        while not processes.join():
            pass
    progress.close()
    return [recordings[rank] for rank in range(setup.ranks)]


def _serve_rank(rank: int, setup: Setup, init_method: str, messages: Any) -> None:
    recording = serve(rank, setup, init_method, messages.put if rank == 0 else lambda _: None)
    messages.put((rank, recording))
    dist.destroy_process_group()
