"""Rounds over gloo: what a notification promises."""

import threading

import numpy as np
import torch.distributed as dist

from eplb.gloo import GlooGroup
from eplb.rounds.exchange import GlooAgreement

NUM_ROUNDS = 300


def test_a_round_is_over_when_it_notifies():
    """Nobody looks again: a worker that was woken a moment too early would sleep for a whole interval."""
    store, late, errors = dist.HashStore(), [0, 0], []

    def rank(number: int) -> None:
        try:
            agreement = GlooAgreement(GlooGroup(store, number, 2, 30.0))
            over = threading.Event()
            for turn in range(NUM_ROUNDS):
                over.clear()
                exchange = agreement.all_gather(np.array([turn, number]), over.set)
                assert over.wait(30)
                late[number] += not exchange.done()
                assert [said.tolist() for said in exchange.result()] == [[turn, 0], [turn, 1]]
            agreement.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and late == [0, 0]
