"""Policies for the planning process. NumPy only, as that process imports this file."""

import os
import sys
import threading
import time

import numpy as np

from eplb.planning.policy import Proposal
from eplb.planning.shares import equal_shares_of


def stay(load_LNE: np.ndarray, physical_LWP: np.ndarray) -> Proposal:
    return Proposal(physical_LWP, equal_shares_of(physical_LWP, load_LNE.shape[2]))


class Rotating:
    def propose(self, load_LNE, physical_LWP, topology):
        return stay(load_LNE, np.roll(physical_LWP, 1, axis=1))


class Telling:
    """Says where it plans, and how often it was asked."""

    def __init__(self):
        self.asked = 0

    def propose(self, load_LNE, physical_LWP, topology):
        self.asked += 1
        print("this must not be taken for an answer", flush=True)
        raise LookupError(f"pid={os.getpid()} torch={'torch' in sys.modules} asked={self.asked}")


class Raising:
    """What cannot be sent back, or would end the process."""

    def __init__(self, kind):
        self.kind = kind

    def propose(self, load_LNE, physical_LWP, topology):
        if self.kind == "exit":
            raise SystemExit(3)
        error = ValueError("with a lock")
        error.lock = threading.Lock()
        raise error


class HangingOnce:
    """Hangs where the file named `path` does not exist yet, and makes it."""

    def __init__(self, path):
        self.path = path

    def propose(self, load_LNE, physical_LWP, topology):
        if not os.path.exists(self.path):
            with open(self.path, "w") as file:
                file.write(str(os.getpid()))
            time.sleep(600)
        return stay(load_LNE, np.roll(physical_LWP, 1, axis=1))


class Unpicklable:
    def __init__(self):
        self.lock = threading.Lock()

    def propose(self, load_LNE, physical_LWP, topology):
        return stay(load_LNE, physical_LWP)


class Unreadable:
    """Pickles here, and cannot be read there."""

    def __init__(self, pid):
        self.pid = pid

    def __setstate__(self, state):
        if state["pid"] != os.getpid():
            raise ImportError("no such module there")
        self.__dict__ |= state

    def propose(self, load_LNE, physical_LWP, topology):
        return stay(load_LNE, physical_LWP)
