"""What one rank does about relocations, beside the main thread.

worker (the state machine: which piece acts when) → rounds (what the ranks say and agree on), planning (from load windows to a
plan), relocation (from a plan's wave to freed slots), report (errors, counts, health). mailbox is what the main thread and the
worker leave for each other, wake what tells it to look. thread and inside_step are the two ways to let it tick; job runs the
policy aside.
"""

from eplb.worker.inside_step import InsideStep
from eplb.worker.rounds import Clock
from eplb.worker.thread import WorkerThread
from eplb.worker.wake import Wake
from eplb.worker.worker import Worker

__all__ = ["Clock", "InsideStep", "Wake", "Worker", "WorkerThread"]
