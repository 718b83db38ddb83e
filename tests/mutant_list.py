"""The bugs that `tests/mutants.py` plants: a line, what to make of it, and the tests that must notice.

Last run as a whole with the code of 5a2bc87 (2026-11-29, CPU): a test notices each of them, or the process ends.
"""

from tests.mutants import Mutant

E = "tests/eplb/test_"
L = "tests/moe_layer/test_"
K = "tests/moe_kernels/test_"

SIMULATION = f"{E}simulation.py"

RELOCATION = (
    # A slot with exactly one reader is freed: the holds' reads do not count.
    Mutant(
        "eplb/relocation/pool.py",
        "is_free[hold.reads] = is_free[hold.writes] = False",
        "is_free[hold.writes] = False",
        (f"{E}pool.py", f"{E}fill.py", SIMULATION),
    ),
    # A slot that only an older version names is written again.
    Mutant(
        "eplb/relocation/pool.py",
        "named = [version.slot_of_lane_S for layer in self._versions() for version in layer.ungraced]",
        "named = [version.slot_of_lane_S for layer in self._versions() for version in layer.ungraced[-1:]]",
        (f"{E}pool.py", f"{E}fill.py", SIMULATION),
    ),
    # Tensors of a slot overlap.
    Mutant(
        "eplb/relocation/pool.py",
        "offset += _aligned(spec.num_bytes)",
        "offset += ALIGNMENT",
        (f"{E}pool.py",),
    ),
    # Versions up to the newest are forgotten one too early.
    Mutant(
        "eplb/relocation/versions.py",
        "self.ungraced = tuple(version for version in self.ungraced if version.number >= number)",
        "self.ungraced = tuple(version for version in self.ungraced if version.number > number)",
        (f"{E}pool.py", f"{E}fill.py", SIMULATION),
    ),
    # The host goes on believing in the version before.
    Mutant(
        "eplb/relocation/handoff.py",
        "versions.current = version",
        "pass",
        (f"{E}fill.py", f"{L}flips.py", SIMULATION),
    ),
    # A pin of an older version is forgotten where the device still runs.
    Mutant(
        "eplb/relocation/pins.py",
        "self._running = [one for one in self._running if not one[1].query()]",
        "self._running = []",
        (f"{E}streams.py", f"{L}flips.py", SIMULATION),
    ),
    # Pins that were dropped without a release are gone at once, with work of theirs still enqueued.
    Mutant(
        "eplb/relocation/pins.py",
        "self.used_on(number, *streams)",
        "pass",
        (f"{E}streams.py", f"{L}flips.py", SIMULATION),
        inside="def let_go(",
    ),
    # A pin holds nothing.
    Mutant(
        "eplb/relocation/pins.py",
        "pins.held[key] = self.version.number",
        "pass",
        (f"{L}flips.py", f"{E}fill.py", SIMULATION),
    ),
    # A flip is not ordered behind the other streams' forwards.
    Mutant(
        "eplb/gate.py",
        "captured = self._join(stream)",
        "captured = []",
        (f"{E}streams.py", f"{E}fill.py", SIMULATION),
        inside="def order_before(",
    ),
    # Other streams are not ordered behind a flip.
    Mutant(
        "eplb/gate.py",
        "other.wait_event(flipped)",
        "pass",
        (f"{E}streams.py", f"{E}fill.py", SIMULATION),
        inside="def order_after(",
    ),
    # A stream that runs its first forward after a flip is ordered behind nothing.
    Mutant(
        "eplb/gate.py",
        "if self.last_flip is not None:",
        "if False:",
        (f"{E}streams.py", f"{E}fill.py", f"{L}flips.py", SIMULATION),
        inside="def note(",
    ),
    # A flip looks like a change of what autograd keeps.
    Mutant(
        "eplb/relocation/table_words.py",
        "self.current_data = self.current.data",
        "self.current_data = self.current",
        (f"{E}table.py",),
    ),
    # Neighbours in memory are taken for one piece though there is a gap.
    Mutant(
        "eplb/relocation/table_words.py",
        "if found and found[-1].chunk is part.chunk and found[-1].end == part.start:",
        "if found and found[-1].chunk is part.chunk:",
        (f"{E}table.py",),
    ),
    # A second stream that ran forwards is forgotten by a flip.
    Mutant(
        "eplb/relocation/handoff.py",
        "others = len(gate.seen) > 1",
        "others = False",
        (f"{E}gate.py", f"{E}handoff.py", SIMULATION),
    ),
    # A flip may happen while another thread chooses.
    Mutant(
        "eplb/gate.py",
        "if not self._changed.wait_for(self._is_empty, timeout):",
        "if False:",
        (f"{E}gate.py",),
        inside="def wait_until_empty(",
    ),
    # The table is switched before its upload is over.
    Mutant(
        "eplb/relocation/fill.py",
        "if not self._finished.query():",
        "if False:",
        (f"{E}fill.py", f"{E}table.py", SIMULATION),
        inside="def poll(",
    ),
    # A rank votes "filled" although its transfers are not over.
    Mutant(
        "eplb/relocation/fill.py",
        "if not is_over:",
        "if False:",
        (f"{E}fill.py", SIMULATION),
        inside="def poll(",
    ),
    # Slots of a wave given up are freed while transfers may still write them.
    Mutant(
        "eplb/relocation/fill.py",
        "if self._agreed_to_start and not self._batch.is_dead():",
        "if False:",
        (f"{E}fill.py", SIMULATION),
    ),
    # A wave may write a lane that an older table still names.
    Mutant(
        "eplb/relocation/fill.py",
        "for one in layer.versions.ungraced:",
        "for one in layer.versions.ungraced[-1:]:",
        (f"{E}fill.py",),
    ),
    # The receiver's rows go to the slot that the lane had before.
    Mutant(
        "eplb/relocation/table.py",
        "table._lane_words[lanes] = slots",
        "pass",
        (f"{E}fill.py", f"{E}table.py", f"{L}flips.py"),
    ),
    # An event is overwritten before it was waited for.
    Mutant(
        "eplb/relocation/events.py",
        "if self._recorded:",
        "if False:",
        (f"{E}events.py",),
        inside="def _set(",
    ),
    # The event's device part is forgotten, so the stream waits for nothing.
    Mutant(
        "eplb/relocation/events.py",
        "stream.wait_event(self._device_event)  # before it is forgotten: this may raise",
        "pass",
        (f"{E}events.py",),
    ),
)

LOAD = (
    # A window holds counts since the start.
    Mutant(
        "eplb/load_window.py",
        "window_NA = np.diff(self._host.numpy(), axis=0)",
        "window_NA = self._host.numpy()[1:].copy()",
        (f"{E}load_window.py",),
    ),
    # A window that begins where there is no free buffer is taken all the same.
    Mutant(
        "eplb/load_window.py",
        "self._begun = bool(free)",
        "self._begun = True",
        (f"{E}load_window.py",),
    ),
    # A snapshot misses what other streams have still to count.
    Mutant(
        "eplb/load_window.py",
        "self._streams.gate.join(stream)",
        "pass",
        (f"{E}load_window.py",),
    ),
    # A window is read while its copy to the host still runs.
    Mutant(
        "eplb/load_window.py",
        "if not self._downloaded.query():",
        "if False:",
        (f"{E}load_window.py",),
    ),
    # A window is used twice.
    Mutant(
        "eplb/worker/planning.py",
        "self._unsent.pop(work, None)",
        "pass",
        (SIMULATION, f"{E}controller.py"),
        inside="def sent(",
    ),
)

ROUNDS = (
    # The ranks' loads are combined by max, not sum.
    Mutant(
        "eplb/rounds/messages.py",
        "load_NA = table[:, num_pools:].sum(axis=0).reshape(-1, num_columns)",
        "load_NA = table[:, num_pools:].max(axis=0).reshape(-1, num_columns)",
        (f"{E}messages.py",),
    ),
    # A plan that was damaged on its way is used.
    Mutant(
        "eplb/rounds/messages.py",
        "if _hash(self._body.data) != self.plan_hash:",
        "if False:",
        (f"{E}messages.py",),
    ),
    # An error on one rank is not enough to give a wave up.
    Mutant(
        "eplb/rounds/protocol.py",
        "failed = any(record.error for record in records)",
        "failed = all(record.error for record in records)",
        (f"{E}protocol.py",),
    ),
    # One rank that has filled is enough to publish.
    Mutant(
        "eplb/rounds/protocol.py",
        "if all(record.filled == next_version for record in records):",
        "if any(record.filled == next_version for record in records):",
        (f"{E}protocol.py",),
    ),
    # One rank that has prepared is enough to fill.
    Mutant(
        "eplb/rounds/protocol.py",
        "if all(record.prepared == next_version for record in records):",
        "if any(record.prepared == next_version for record in records):",
        (f"{E}protocol.py",),
    ),
    # Grace is over when one rank says so.
    Mutant(
        "eplb/rounds/protocol.py",
        "if not all(record.graced == agreed.version for record in records):",
        "if not any(record.graced == agreed.version for record in records):",
        (f"{E}protocol.py",),
    ),
    # Ranks with different plans go on.
    Mutant(
        "eplb/rounds/protocol.py",
        "if any(record.plan_hash != records[0].plan_hash for record in records if record.prepared == next_version):",
        "if False:",
        (f"{E}protocol.py",),
    ),
    # A rank that has yet to load weights copies an old expert over a new one.
    Mutant(
        "eplb/rounds/protocol.py",
        "return any(record.hold or record.holds_completed != records[0].holds_completed for record in records)",
        "return any(record.hold for record in records)",
        (f"{E}protocol.py",),
    ),
    # The waves behind a hold are started all the same.
    Mutant(
        "eplb/rounds/protocol.py",
        "if drop_rest or agreed.wave + 1 == agreed.num_waves:",
        "if agreed.wave + 1 == agreed.num_waves:",
        (f"{E}protocol.py",),
    ),
)

WORKER = (
    # The planning process outlives its parent where another process holds the pipe open.
    Mutant(
        "eplb/plan_process.py",
        "while os.getppid() == self._parent:",
        "while True:",
        (f"{E}plan_process.py",),
    ),
    # A policy that hangs in the planning process is left there.
    Mutant(
        "eplb/worker/planning.py",
        "self._planner.give_up()",
        "pass",
        (f"{E}plan_process.py",),
    ),
    # A rank that has filled its slots waits with its next word for its next turn.
    Mutant(
        "eplb/rounds/protocol.py",
        "return record.filled == agreed.version + 1",
        "return record.filled == agreed.version + 2",
        (f"{E}ticks.py",),
    ),
    # Nothing tells the worker of a flip.
    Mutant(
        "eplb/relocation/handoff.py",
        "self.notify()",
        "pass",
        (f"{E}ticks.py", f"{E}handoff.py"),
    ),
    # A worker that a round wakes finds it not over yet, and sleeps on.
    Mutant(
        "eplb/rounds/exchange.py",
        "return self._future.done()",
        "return self._work.is_completed()",
        (f"{E}exchange.py",),
    ),
    # A long transfer is looked at every half millisecond.
    Mutant(
        "eplb/worker/looks.py",
        "return min(longest, max(_SHORTEST, elapsed / 32, took * 7 / 8 - elapsed))",
        "return min(longest, max(_SHORTEST, took * 7 / 8 - elapsed))",
        (f"{E}ticks.py",),
    ),
    # A worker begins a piece right before the next step.
    Mutant(
        "eplb/rhythm.py",
        "if _LAUNCHED * period <= since <= _BUSY * period:",
        "if _LAUNCHED * period <= since <= period:",
        (f"{E}rhythm.py",),
    ),
    # It waits before long steps, too.
    Mutant(
        "eplb/rhythm.py",
        "if period > _LONGEST or since > _LATE * period:",
        "if since > _LATE * period:",
        (f"{E}rhythm.py",),
    ),
    # It waits for ever for steps that follow each other at once.
    Mutant(
        "eplb/rhythm.py",
        "while self.last[0] <= steps + 1 and (seconds := self._seconds()):",
        "while seconds := self._seconds():",
        (f"{E}rhythm.py",),
    ),
    # The time between two steps is that since the last look.
    Mutant(
        "eplb/rhythm.py",
        "self._period = (stepped_at - seen_at) / (steps - seen_steps)",
        "self._period = stepped_at - seen_at",
        (f"{E}rhythm.py",),
    ),
    # What was held before a tick that waited for nothing counts no more.
    Mutant(
        "eplb/rhythm.py",
        "has_slept = False",
        "has_slept = True",
        (f"{E}rhythm.py",),
    ),
    # A thread keeps to no rhythm.
    Mutant(
        "eplb/worker/thread.py",
        "if rhythm is not None and rhythm.wait():",
        "if False:",
        (f"{E}ticks.py",),
    ),
    # Nor is it asked for one at rest, nor where there is no bound.
    Mutant(
        "eplb/worker/thread.py",
        "self._worker.inbox.rhythm = None if self._worker.is_at_rest else self._rhythm",
        "self._worker.inbox.rhythm = self._rhythm",
        (f"{E}ticks.py",),
    ),
    Mutant(
        "eplb/worker/thread.py",
        "self._rhythm = Rhythm() if config.bytes_per_second is not None else None",
        "self._rhythm = Rhythm()",
        (f"{E}ticks.py",),
    ),
    # A wave is told the sums of another layer's table.
    Mutant(
        "eplb/rounds/messages.py",
        "at += 12 * lanes + 4 * num_words",
        "at += 12 * lanes",
        (f"{E}messages.py",),
    ),
    # The worker spins.
    Mutant(
        "eplb/worker/thread.py",
        "self._wake.clear()",
        "pass",
        (f"{E}worker.py",),
    ),
    # A worker whose thread has ended says nothing of it.
    Mutant(
        "eplb/worker/thread.py",
        "if not self.is_alive() and not self._leaving:",
        "if False:",
        (f"{E}worker.py",),
    ),
    # A policy that never returns is waited for without an end.
    Mutant(
        "eplb/worker/planning.py",
        "if self._clock() - self._job_began_at > self._config.planning_timeout:",
        "if False:",
        (f"{E}worker.py", f"{E}controller.py", SIMULATION),
    ),
    # After an abandoned proposal the next one begins at once.
    Mutant(
        "eplb/worker/planning.py",
        "if self._clock() >= self._propose_after:",
        "if True:",
        (f"{E}worker_pieces.py", SIMULATION),
    ),
    # A vote for an abandoned wave counts for the next one.
    Mutant(
        "eplb/worker/relocation.py",
        "if fill is None or fill.attempt != (agreed.proposal, agreed.wave):",
        "if fill is None:",
        (f"{E}worker_pieces.py", SIMULATION),
    ),
    # Transfers that hang are waited for without an end.
    Mutant(
        "eplb/worker/relocation.py",
        "elif self._clock() - self._fill_began_at > self._config.transfer_timeout:",
        "elif False:",
        (f"{E}worker_pieces.py", SIMULATION),
    ),
    # Grace is over before the device has come to the flip.
    Mutant(
        "eplb/worker/relocation.py",
        "if not handoff.flipped.query():",
        "if False:",
        (f"{E}worker_pieces.py", SIMULATION),
    ),
    # Grace is over while a backward still needs the old version.
    Mutant(
        "eplb/worker/relocation.py",
        "if any(held):",
        "if False:",
        (f"{E}worker_pieces.py", f"{L}flips.py", SIMULATION),
    ),
    # A wave given up in FILL is forgotten, and its transfers with it.
    Mutant(
        "eplb/worker/relocation.py",
        "self.zombies.append(fill)",
        "pass",
        (f"{E}worker_pieces.py", SIMULATION),
    ),
    # A stage that fails keeps this rank from speaking.
    Mutant(
        "eplb/worker/worker.py",
        "self.fail(error)",
        "raise",
        (f"{E}worker.py", f"{E}controller.py", SIMULATION),
        inside="def tick(",
    ),
    # A rank whose publication failed tries again in every tick.
    Mutant(
        "eplb/worker/worker.py",
        "if self._clock() < self._retry_at:",
        "if False:",
        (f"{E}worker.py",),
    ),
    # Rounds that failed are begun again.
    Mutant(
        "eplb/worker/rounds.py",
        "self.is_lost = True",
        "pass",
        (f"{E}worker_pieces.py", SIMULATION),
        inside="def hear(",
    ),
    # An idle rank speaks all the time.
    Mutant(
        "eplb/worker/rounds.py",
        "return self._clock() - self.spoke_at >= interval",
        "return True",
        (f"{E}worker_pieces.py", SIMULATION),
    ),
    # Groups and connections stay behind.
    Mutant(
        "eplb/worker/rounds.py",
        "made.close()",
        "pass",
        (f"{E}worker_pieces.py", f"{E}communicators.py", f"{L}serving.py"),
    ),
)

CONTROLLER = (
    # A flip that could not be enqueued is lost.
    Mutant(
        "eplb/relocation/handoff.py",
        "self._copy()",
        "self.flipped = self._event; self._copy()",
        (f"{E}handoff.py",),
    ),
    # Loading weights does not wait for relocations under way.
    Mutant(
        "eplb/controller.py",
        "while not worker.mailbox.is_held:",
        "while False:",
        (f"{E}controller.py", f"{E}worker.py", SIMULATION),
    ),
    # Fills read what the caller has not written yet.
    Mutant(
        "eplb/controller.py",
        "self._streams.side.wait_event(self._streams.current().record_event())",
        "pass",
        (f"{E}controller.py", f"{E}worker.py", SIMULATION),
    ),
    # A hold that failed counts as one that was completed.
    Mutant(
        "eplb/controller.py",
        "worker.mailbox.end_hold(completed)",
        "worker.mailbox.end_hold(True)",
        (f"{E}controller.py", f"{E}worker.py", SIMULATION),
    ),
    # Warm-up is counted as load.
    Mutant(
        "eplb/controller.py",
        "self._count_tokens_as(0)",
        "pass",
        (f"{E}controller.py", f"{L}registration.py"),
    ),
    # Layers of a controller whose worker still acts are given to another one.
    Mutant(
        "eplb/controller.py",
        "if self.is_over:",
        "if True:",
        (f"{E}worker.py",),
        inside="def close(",
    ),
    # Step counts although the stream is captured.
    Mutant(
        "eplb/controller.py",
        "if streams.is_capturing():",
        "if False:",
        (f"{E}controller.py",),
    ),
    # What another stream runs next is not behind the flip.
    Mutant(
        "eplb/relocation/handoff.py",
        "gate.last_flip = self._event",
        "pass",
        (f"{E}gate.py", f"{E}handoff.py"),
    ),
    # A wake-up is lost on whoever looks twice.
    Mutant(
        "eplb/worker/wake.py",
        "self.set()",
        "pass",
        (f"{E}ticks.py",),
        inside="def wait(",
    ),
)

PLANNING = (
    # A later wave reads from a lane that an earlier one has emptied.
    Mutant("eplb/planning/waves.py", "work.live[pair.dropped].remove((pair.rank, lane))", "pass", (f"{E}plan.py",)),
    # The last copy of an expert is dropped.
    Mutant(
        "eplb/planning/waves.py",
        "dropped = next(e for e in work.drops[rank] if work.counts[e] > 1)",
        "dropped = next(e for e in work.drops[rank])",
        (f"{E}plan.py",),
    ),
    # More moves than free slots.
    Mutant("eplb/planning/waves.py", "room[rank] -= 1", "pass", (f"{E}plan.py",)),
    # The bound on bytes in flight holds for the first move only.
    Mutant("eplb/planning/waves.py", "wave.used += work.num_bytes", "pass", (f"{E}plan.py",)),
    # Layers of a pool without a free slot on one rank are planned.
    Mutant(
        "eplb/planning/make_plan.py",
        "elif (free_slots_GW[pool] < 1).any() or (current[index].lanes_WS != EMPTY).all(axis=1).any():",
        "elif (free_slots_GW[pool] < 1).all() or (current[index].lanes_WS != EMPTY).all(axis=1).any():",
        (f"{E}plan.py",),
    ),
    # The plan that other ranks read lacks the lanes that a later wave empties.
    Mutant("eplb/planning/plan.py", "held[update.layer] = lanes_WS", "pass", (f"{E}plan.py",)),
    # The shares of an expert do not end at exactly one.
    Mutant(
        "eplb/planning/shares.py",
        "inside[offsets_E1[1:][counts_E > 0] - 1] = 1 << SHARE_BITS",
        "pass",
        (f"{E}shares.py", f"{E}table.py"),
    ),
    # Shares that do not sum to one are published.
    Mutant(
        "eplb/planning/shares.py",
        "wrong = np.flatnonzero((counts_E > 0) & (np.abs(sums_E - 1) > 1e-6))",
        "wrong = np.flatnonzero((counts_E > 0) & (np.abs(sums_E - 1) > 1))",
        (f"{E}shares.py", f"{E}table.py"),
    ),
    # Windows before the last one count for nothing.
    Mutant(
        "eplb/worker/planning.py",
        "self._seen.append(self.loads.load_NA.sum(axis=0))",
        "pass",
        (f"{E}worker.py",),
    ),
    # Noise is taken for a walk.
    Mutant(
        "eplb/planning/forecast.py",
        "correlation_L = np.clip(covariance_L / variance_L, -0.5, 1.0)",
        "correlation_L = np.clip(covariance_L / variance_L, 0.0, 1.0)",
        (f"{E}forecast.py",),
    ),
    # After a sudden change, windows before it still count.
    Mutant(
        "eplb/planning/forecast.py",
        "weight_HL1 = (1 - gain_L1) ** age_H11",
        "weight_HL1 = (1 - gain_L1) ** 0 * np.ones_like(age_H11)",
        (f"{E}forecast.py",),
    ),
    # Spreading the hottest experts makes ranks uneven.
    Mutant(
        "eplb/planning/policy/spread.py",
        "fits_T = (gain_T >= LEAST_GAIN) & (highest_T <= np.maximum(limit_L, highest_L)[layer_T] + 1e-9)",
        "fits_T = gain_T >= LEAST_GAIN",
        (f"{E}spread.py",),
    ),
    # A pair of moves is torn apart by the layer's budget.
    Mutant(
        "eplb/planning/policy/spread.py",
        "fits = moves_T <= max_moves_L[layer_T]",
        "fits = max_moves_L[layer_T] > 0",
        (f"{E}spread.py",),
    ),
    # The expert that leaves its rank to make room is lost.
    Mutant(
        "eplb/planning/policy/spread.py",
        "pair_TQ[each, to_LW[layer_2, rank_2]] = pair_TQ[each, lane_2]",
        "pass",
        (f"{E}spread.py",),
    ),
    # A pair that counts as one move exceeds the plan's budget.
    Mutant(
        "eplb/planning/policy/spread.py",
        "moves_T = np.repeat([1, 2], [len(layer_1), len(layer_2)])",
        "moves_T = np.repeat([1, 1], [len(layer_1), len(layer_2)])",
        (f"{E}spread.py",),
    ),
)

LAYER = (
    # Training that goes on with replicas gives them other tokens than without the interruption.
    Mutant(
        "moe_layer/trainable/checkpoint.py",
        'experts.owned.load_E.copy_(torch.tensor(saved[name]["load"][experts.owned.rank], dtype=torch.int64))',
        "pass",
        (f"{L}train_checkpoint.py",),
    ),
    # Ranks that start from different files compute with wrong experts.
    Mutant(
        "moe_layer/weights/starting.py", "_check_equal(start, process_group, name)", "pass", (f"{L}placement_start.py",)
    ),
    # A saved placement is checked and then not used.
    Mutant("moe_layer/layer.py", "placement=start,", "placement=None,", (f"{L}placement_start.py",)),
    # Blocks of a transformers model start as if there were no file.
    Mutant(
        "moe_layer/hf/make.py",
        "placement=placement,",
        "placement=None,",
        ("tests/moe_layer/hf/test_swap.py::test_blocks_start_from_a_file",),
    ),
    # `state_dict()` between two ranks' flips: an expert that is in no rank's current table.
    Mutant(
        "moe_layer/weights/logical.py",
        "mine[1, list(retiring)] = True",
        "pass",
        (f"{L}state_dict.py", f"{L}serving.py"),
    ),
    # Loading reaches one replica of each expert.
    Mutant(
        "moe_layer/weights/experts.py",
        "self._write(tensors, live.get(expert, []))",
        "self._write(tensors, live.get(expert, [])[:1])",
        (f"{L}state_dict.py", f"{L}registration.py", f"{L}serving.py"),
        inside="def load_experts(",
    ),
    # Ranks choose tiles by their own number of tokens.
    Mutant(
        "moe_layer/dispatch/all_to_all.py",
        "num_tokens=sum(one >> 1 for one in last),",
        "num_tokens=num_tokens,",
        (f"{L}expert_parallel.py",),
    ),
    # Ranks of which only some will run a backward are not told.
    Mutant(
        "moe_layer/dispatch/all_to_all.py",
        "check_gradients([bool(one & 1) for one in last])",
        "check_gradients([])",
        (f"{L}expert_parallel.py",),
    ),
    # Rows of one lane change their order on the way.
    Mutant(
        "moe_layer/dispatch/all_to_all.py",
        "lane_WS = torch.arange(num_lanes, dtype=torch.int32, device=lanes.device).repeat(num_ranks)",
        "lane_WS = torch.arange(num_lanes, dtype=torch.int32, device=lanes.device).flip(0).repeat(num_ranks)",
        (f"{L}expert_parallel.py",),
    ),
    # Results come from the rank of another row's expert.
    Mutant(
        "moe_layer/dispatch/ways.py",
        "return came.view(num_ranks, self.num_padded, *came.shape[1:])[self.owners_N, place_N]",
        "return came.view(num_ranks, self.num_padded, *came.shape[1:])[self.owners_N.flip(0), place_N]",
        (f"{L}all_gather.py",),
    ),
    # Padding has lanes: whatever the memory held is computed.
    Mutant(
        "moe_layer/dispatch/packed.py",
        "integers[num_tokens:, :top_k] = -1",
        "pass",
        (f"{L}packed.py",),
    ),
    # With static shapes a rank whose backward the others will not take part in is not told.
    Mutant(
        "moe_layer/dispatch/all_gather.py",
        "looks = not static or (needs_grad and not _is_capturing(x_TH))",
        "looks = not static",
        (f"{L}all_gather.py",),
    ),
    # A rank takes as many turns as its own tokens need.
    Mutant(
        "moe_layer/forward/executors.py",
        "for first in range(0, max_tokens, most):",
        "for first in range(0, len(x_TH), most):",
        (f"{L}max_tokens.py", f"{L}all_gather.py"),
    ),
    # A choice that pays only without padding is made with any.
    Mutant(
        "moe_layer/dispatch/choose.py",
        "if extra <= most:",
        "if extra <= most or it.max_tokens:",
        (f"{L}choose.py",),
    ),
    # Gradients of a token's rows are those of one expert.
    Mutant(
        "moe_layer/dispatch/all_gather.py",
        "grad_x_TH += grad_TKH[:, k]",
        "grad_x_TH = grad_TKH[:, k].float()",
        (f"{L}all_gather.py",),
    ),
    # The backward goes by the lanes of the newest table.
    Mutant(
        "moe_layer/forward/recomputed.py",
        "ctx.held.end_backward(read_again=True)",
        "pass",
        (f"{L}expert_parallel.py",),
    ),
    # A version is given up although the graph is retained.
    Mutant(
        "moe_layer/weights/versions.py",
        "if not is_graph_retained():",
        "if True:",
        (f"{L}flips.py", f"{L}checkpoint_and_compile.py"),
    ),
    # What a masked token holds reaches the router's gradient.
    Mutant(
        "moe_layer/layer.py",
        "if torch.is_grad_enabled():",
        "if False:",
        (f"{L}forward.py",),
    ),
    # Masked tokens are computed for ids given from outside.
    Mutant(
        "moe_layer/arguments.py",
        "is_none = is_none | ~mask_T[:, None]",
        "pass",
        (f"{L}forward.py",),
    ),
    # Under autocast the output has the layer's dtype.
    Mutant(
        "moe_layer/layer.py",
        "return y.to(torch.get_autocast_dtype(device_type))",
        "return y",
        (f"{L}modes.py", f"{L}checkpoint_and_compile.py"),
    ),
    # Where no gradient is needed, the router's correction bias does not count.
    Mutant(
        "moe_layer/forward/executors.py",
        "bias_E = gate.e_score_correction_bias if rule.correction_bias else None",
        "bias_E = None",
        (f"{L}forward.py", f"{L}modes.py"),
    ),
    # A router in float32 is cast with its layer.
    Mutant(
        "moe_layer/router.py",
        "return tensor.to(result.device) if is_cast else result",
        "return result",
        (f"{L}modes.py",),
    ),
    # All ranks begin with the same replica.
    Mutant(
        "moe_layer/weights/experts.py",
        "self.rank_start = (resident.rank * GOLDEN) % 2**SHARE_BITS",
        "self.rank_start = 0",
        (f"{L}expert_parallel.py",),
    ),
    # A backward takes weights that its forward did not have.
    Mutant(
        "moe_layer/weights/versions.py",
        "is_written = written is not None and written._version != self._num_writes",
        "is_written = False",
        (f"{L}state_dict.py",),
    ),
    # A backward that reads the weights again takes those of another place.
    Mutant(
        "moe_layer/weights/versions.py",
        "if is_written or (read_again and (experts is None or experts.written is not written)):",
        "if is_written:",
        (f"{L}state_dict.py",),
    ),
    # A rank takes another rank's experts from a state dict.
    Mutant(
        "moe_layer/weights/experts.py",
        "if len(first) == len(own) == stop - start < self.num_experts and start != own.start:",
        "if False:",
        (f"{L}expert_parallel.py",),
    ),
    # A state dict of all experts that was cut to a rank's is refused.
    Mutant(
        "moe_layer/weights/experts.py",
        "if len(first) == len(own) == stop - start < self.num_experts and start != own.start:",
        "if len(first) == len(own) < self.num_experts and (start, stop) != (own.start, own.stop):",
        (f"{L}expert_parallel.py",),
    ),
)

BATCH_SHARES = (
    # After a flip on another thread, lanes are chosen by a table that the other ranks have not been told of.
    Mutant(
        "moe_layer/forward/batch_shares.py",
        "is_same = now.version.number == pin.version.number",
        "is_same = True",
        (f"{L}batch_shares.py",),
    ),
    # What comes is derived though ranks have different tables.
    Mutant(
        "moe_layer/dispatch/all_to_all.py",
        "if versions is None or len(set(versions)) > 1:",
        "if versions is None:",
        (f"{L}batch_shares.py",),
    ),
    # The choice keeps its second pin, so that the version never ends.
    Mutant(
        "moe_layer/forward/batch_shares.py",
        "now.release()",
        "self.__dict__.setdefault('kept', []).append(now)",
        (f"{L}batch_shares.py",),
    ),
)

KERNELS = (
    # A compiled kernel is used for addresses that it was not compiled for.
    Mutant(
        "kernels/moe_kernels/base/launch.py",
        "parts += argument.dtype, argument.data_ptr() & 15",
        "parts.append(argument.dtype)",
        (f"{K}launch.py",),
    ),
    # A profiler's hooks are not called.
    Mutant("kernels/moe_kernels/base/launch.py", "elif _may_have_launch_hooks():", "elif False:", (f"{K}launch.py",)),
    # A kernel is launched on the current device, not on that of its arguments.
    Mutant(
        "kernels/moe_kernels/base/launch.py",
        "with on_device(device_index):",
        "with nullcontext():",
        (f"{K}launch.py",),
    ),
    # Each number of tokens has tiles of its own, so ranks' bits may differ.
    Mutant(
        "kernels/moe_kernels/operands/config.py",
        "bucket = next_power_of_2(num_tokens)",
        "bucket = num_tokens",
        (f"{K}config.py",),
    ),
    # Too few tiles.
    Mutant(
        "kernels/moe_kernels/tiles/tiles.py",
        "return nonempty + (num_rows - nonempty) // block_m",
        "return 1 + num_rows // block_m",
        (f"{K}schedule.py",),
    ),
    # A forward that a checkpoint repeats counts again.
    Mutant(
        "kernels/moe_kernels/operands/load.py",
        "if self.increment_1 is None or torch._C._current_graph_task_id() == -1:",
        "if True:",
        (f"{L}checkpoint_and_compile.py", f"{K}replicas.py"),
    ),
    # Warm-up counts.
    Mutant(
        "kernels/moe_kernels/replicas/replicas.py",
        "load.load_E.add_(counts_E1[:-1] * load.increment_1)",
        "load.load_E.add_(counts_E1[:-1])",
        (f"{K}replicas.py",),
    ),
    # Rows that were skipped get a gradient.
    Mutant(
        "kernels/moe_kernels/gemms/combine.py",
        "grad_TKH = torch.where((lanes_TK >= 0)[:, :, None], grad_y_TH[:, None, :], 0.0)",
        "grad_TKH = grad_y_TH[:, None, :].expand(*lanes_TK.shape, -1)",
        (f"{K}combine.py",),
    ),
    # NaN logits win.
    Mutant(
        "kernels/moe_kernels/routing/routing.py",
        'key = torch.where(torch.isnan(key), float("-inf"), key)',
        "pass",
        (f"{K}routing.py",),
    ),
    # The local op takes a table with replicas, of which it reads the first only.
    Mutant(
        "kernels/moe_kernels/local_experts.py",
        "table.check_local(load.load_E.shape[0], x_TH.device)",
        "table.check(load.load_E.shape[0], x_TH.device)",
        (f"{K}local_forward.py",),
    ),
    # One reciprocal a group: it does not correct quotients of rows with a tiny scale.
    Mutant(
        "kernels/moe_kernels/quantised/fp8.py",
        "power = tl.where(scale < 1.0 / _USUAL, _USUAL, tl.where(scale > _USUAL, 1.0 / _USUAL, 1.0))",
        "power = tl.where(scale > _USUAL, 1.0 / _USUAL, 1.0)",
        (f"{K}fp8_experts.py",),
    ),
    # … and makes negative zeros positive.
    Mutant(
        "kernels/moe_kernels/quantised/fp8.py",
        "values = negated * inverse",
        "values = tl.abs(negated * inverse)",
        (f"{K}fp8_experts.py",),
    ),
    # Both products as one op: rows go home unweighted.
    Mutant(
        "kernels/moe_kernels/gemms/expert_mlp.py",
        "expert_mlp_triton(*inputs, fanout, *configs, homes=homes)",
        "expert_mlp_triton(*inputs[:4], row_weights_N * 0 + 1, fanout, *configs, homes=homes)",
        (f"{K}quantised_experts.py",),
    ),
    # … and a wrong x is not refused by its name.
    Mutant(
        "kernels/moe_kernels/gemms/expert_mlp.py",
        'check_kind("x_RH", x_RH, torch.Tensor)',
        "pass",
        (f"{K}arguments.py",),
    ),
    # Shares by batch: a rank splits an expert though that saves nothing.
    Mutant(
        "kernels/moe_kernels/replicas/solve_shares_rows.py",
        "is_whole = gathers | (whole <= tl.maximum(bound, ((both + sum_rest + 1) >> 1) + EXPERT_COST))",
        "is_whole = gathers | (whole <= ((both + sum_rest + 1) >> 1) + EXPERT_COST)",
        (f"{K}batch_shares.py",),
    ),
    # One round is all.
    Mutant(
        "kernels/moe_kernels/replicas/solve_shares_steps.py",
        "goes_on = (round < _ROUNDS) & has_moved & (tl.max(load, axis=0) > bound)",
        "goes_on = round < 1",
        (f"{K}batch_shares.py",),
    ),
    # A step of pairs is skipped though it is needed.
    Mutant(
        "kernels/moe_kernels/replicas/solve_shares_steps.py",
        "used |= (quotas[mask - 1] != 0).to(tl.int32) << mask",
        "used |= (quotas[mask - 1] > 1000).to(tl.int32) << mask",
        (f"{K}batch_shares.py",),
    ),
    # A rank counts its own tokens among those before it.
    Mutant(
        "kernels/moe_kernels/replicas/solve_shares_pairs.py",
        "before += tl.where(peer < rank, counts, 0)",
        "before += tl.where(peer <= rank, counts, 0)",
        (f"{K}batch_shares.py",),
    ),
    # Of many elements, those of the ranks before are forgotten.
    Mutant(
        "kernels/moe_kernels/replicas/replicas_triton.py",
        "below = end - start if BY_QUOTA else ranks_below(end - start, count)",
        "below = end if BY_QUOTA else ranks_below(end - start, count)",
        (f"{K}batch_shares.py",),
    ),
    # A schedule for other tiles is accepted.
    Mutant(
        "kernels/moe_kernels/tiles/tiles.py",
        "if value != own:",
        "if value > own:",
        (f"{K}schedule.py",),
    ),
    # A chunk's rows of a lane begin where the lane does.
    Mutant(
        "kernels/moe_kernels/local_schedule.py",
        "position = tl.gather(tl.cumsum(counts, axis=0) - counts, bins, axis=0) + start + rank",
        "position = tl.gather(tl.cumsum(counts, axis=0) - counts, bins, axis=0) + rank",
        (f"{K}local_schedule.py",),
    ),
    # The load of an expert is that of the lane with its number.
    Mutant(
        "kernels/moe_kernels/local_schedule.py",
        "_record(load_ptr, increment_ptr, expert, num_experts, tl.load(counts_ptr + own))",
        "_record(load_ptr, increment_ptr, expert, num_experts, tl.load(counts_ptr + expert))",
        (f"{K}local_schedule.py",),
    ),
    # Of equal bfloat16 logits the last is chosen.
    Mutant(
        "kernels/moe_kernels/routing/routing_triton.py",
        "key = ((key ^ _TAKEN).to(tl.uint32, bitcast=True) >> 1) & 0x7FFF8000 | (0x7FFF - expert).to(tl.uint32)",
        "key = ((key ^ _TAKEN).to(tl.uint32, bitcast=True) >> 1) & 0x7FFF8000 | expert.to(tl.uint32)",
        (f"{K}routing.py",),
    ),
    # Second derivatives leave terms out where what comes in has one itself.
    Mutant(
        "kernels/moe_kernels/base/once.py",
        "return refuse_second(what, found, grads) if known else found",
        "return found",
        (f"{L}training_ranks.py", f"{L}trainable.py"),
    ),
    # A table may have fewer lanes than experts.
    Mutant(
        "kernels/moe_kernels/operands/table.py",
        "if self.lane_to_slot_L.shape[0] < num_experts:",
        "if False:",
        (f"{K}arguments.py",),
    ),
)

GRADIENTS = (
    # The routing weight is left out of the pre-activation's gradient.
    Mutant(
        "kernels/moe_kernels/gradients/experts_grad_hidden.py",
        "hidden, grad_gate, grad_up = activated_backward(product * row_weight[:, None], gate, up, ACTIVATION)",
        "hidden, grad_gate, grad_up = activated_backward(product, gate, up, ACTIVATION)",
        (f"{K}expert_rows.py",),
    ),
    # A clamped gate has a gradient.
    Mutant(
        "kernels/moe_kernels/base/numerics.py",
        "grad_gate = tl.where(gate <= LIMIT, grad_gate, 0.0)",
        "grad_gate = grad_gate",
        (f"{K}expert_rows.py",),
    ),
    # Of several lanes of a slot only the first counts.
    Mutant(
        "kernels/moe_kernels/gradients/gradient_tiles.py",
        "later = (lane > own) & (slot == own_slot) & (slot >= 0)",
        "later = (lane > own) & (slot == own_slot) & (slot < 0)",
        (f"{K}expert_rows.py",),
    ),
    # The sum over a lane's rows goes on into the next lane.
    Mutant(
        "kernels/moe_kernels/gradients/experts_grad_weights.py",
        "left_exists, right_exists = inside[:, None], inside[:, None]",
        "left_exists, right_exists = (k >= 0)[:, None], (k >= 0)[:, None]",
        (f"{K}expert_rows.py",),
    ),
    # Rows of no lane give x a gradient.
    Mutant(
        "kernels/moe_kernels/gradients/experts_grad_x.py",
        "for first in range(0, tl.where(lane < num_lanes, inner, 0), BLOCK_K):",
        "for first in range(0, inner, BLOCK_K):",
        (f"{K}expert_rows.py",),
    ),
    # A bias of the down projection gets unweighted gradients.
    Mutant(
        "kernels/moe_kernels/gradients/expert_rows_triton.py",
        "experts_grad_bias(grad_GH, row_weights_N, *sums, grad_fanout, out_SP=out, adds=adds)",
        "experts_grad_bias(grad_GH, None, *sums, grad_fanout, out_SP=out, adds=adds)",
        (f"{K}expert_rows.py",),
    ),
    # A backward that may run again finds its pre-activation overwritten.
    Mutant(
        "kernels/moe_kernels/gradients/expert_rows.py",
        "overwrites = ctx.owns_pre and not torch._C._autograd._get_current_graph_task_keep_graph()",
        "overwrites = ctx.owns_pre",
        (f"{K}expert_rows.py",),
    ),
    # An output that a caller holds is overwritten.
    Mutant(
        "kernels/moe_kernels/gradients/expert_rows.py",
        "ctx.owns_pre = ctx.is_direct and torch._C._autograd._top_saved_tensors_default_hooks(False) is None",
        "ctx.owns_pre = True",
        (f"{K}expert_rows.py",),
    ),
    # Frozen experts keep x.
    Mutant(
        "kernels/moe_kernels/gradients/expert_rows.py",
        "x_RH if needs_x else None,",
        "x_RH,",
        (f"{K}expert_rows.py",),
    ),
)

ONE_SIDED = (
    # A lane's rows begin with those of the lane before.
    Mutant(
        "kernels/moe_kernels/peers/receive_rows.py",
        "listed = peer * per_rank + first - (end - own)  # so far is a row of the lane from its place in the lists",
        "listed = peer * per_rank - (end - own)",
        (f"{L}one_sided.py",),
    ),
    # Of few tokens, each rank's list goes on where that of the rank before ends.
    Mutant(
        "kernels/moe_kernels/peers/send_few_rows.py",
        "before = tl.sum(tl.where((every >= lane - part) & (every < lane), counts, 0), axis=0)",
        "before = tl.sum(tl.where(every < lane, counts, 0), axis=0)",
        (f"{L}one_sided.py",),
    ),
    # Who returns rows does not say so.
    Mutant(
        "kernels/moe_kernels/peers/return_rows.py",
        "if is_last_program(state_ptr):",
        "if is_last_program(state_ptr) & (rank < 0):",
        (f"{L}one_sided.py",),
    ),
    # Rows go home to the next rank.
    Mutant(
        "kernels/moe_kernels/tiles/homes.py",
        "home = tl.load(homes_ptr + flat // rows_per_home)",
        "home = tl.load(homes_ptr)",
        (f"{L}one_sided.py",),
    ),
    # A peer that does not come is no error.
    Mutant(
        "kernels/moe_kernels/peers/peers.py",
        "if (missing > 0) & (failed == 0):",
        "if (missing > 100) & (failed == 0):",
        (f"{L}one_sided.py",),
    ),
    # Ranks with different bounds are not told.
    Mutant(
        "kernels/moe_kernels/peers/receive_rows.py",
        "if came & (tl.max((theirs != told).to(tl.int32), axis=0) > 0):",
        "if came & (tl.max((theirs != theirs).to(tl.int32), axis=0) > 0):",
        (f"{L}one_sided.py",),
    ),
    # Marks of an earlier forward count as rows that are here.
    Mutant(
        "kernels/moe_kernels/peers/return_rows.py",
        "here = seen == epoch",
        "here = seen > 0",
        (f"{L}one_sided.py",),
    ),
    # Backwards of different forwards are not told apart.
    Mutant(
        "kernels/moe_kernels/peers/peers.py",
        "return kind << _KIND_BIT | number & (1 << _KIND_BIT) - 1",
        "return kind << _KIND_BIT",
        (f"{L}one_sided_gradients.py",),
    ),
    # The gradient of a weight without a row is what another step has left there.
    Mutant(
        "moe_layer/dispatch/one_sided_gradients.py",
        "return y_TH, torch.where(lanes_TK >= 0, came_TK, 0.0)",
        "return y_TH, came_TK.clone()",
        (f"{L}one_sided_gradients.py",),
    ),
    # A rank that leaves in the midst of a backward is found out after the optimizer's step.
    Mutant(
        "moe_layer/dispatch/one_sided_gradients.py",
        "self._check()",
        "pass",
        (f"{L}one_sided_gradients.py",),
        inside="def check() -> None:",
    ),
    # A row's number goes home beside the wrong row.
    Mutant(
        "kernels/moe_kernels/peers/return_sorted.py",
        "tl.store(address.to(scalars_ptr.dtype) + flat % rows_per_home, scalar, mask=item % blocks == 0)",
        "tl.store(address.to(scalars_ptr.dtype) + position % rows_per_home, scalar, mask=item % blocks == 0)",
        (f"{L}one_sided_gradients.py", f"{K}return_sorted.py"),
    ),
)

TRAINING = (
    # The weights of the last step stay in the lanes.
    Mutant(
        "moe_layer/trainable/copies.py",
        "self.is_stale = True",
        "pass",
        (f"{L}training_moves.py",),
        inside="def _returned",
    ),
    # Gradients of all micro-batches but the last are lost.
    Mutant(
        "moe_layer/trainable/copies.py",
        "return waiting.add_(grad)  # of the backward that made it, it was the only reader",
        "return grad",
        (f"{L}training_moves.py",),
    ),
    # What failed half-way is forgotten.
    Mutant("moe_layer/trainable/copies.py", "self._begun = what", "self._begun = None", (f"{L}training_moves.py",)),
    # After a step that was given up, ranks go on with different placements.
    Mutant("moe_layer/training/steps.py", "experts.owned.go_home()", "pass", (f"{L}training_moves.py",)),
    # Of an expert's replicas one has a gradient.
    Mutant(
        "moe_layer/trainable/publish.py",
        "total[self._rows[turn]] += received[turn].float()  # no row twice: no order among threads",
        "pass",
        (f"{L}training_moves.py",),
    ),
    # A new placement goes by the old one's route.
    Mutant(
        "moe_layer/trainable/copies.py",
        "self._route, self.is_stale = None, True",
        "self.is_stale = True",
        (f"{L}training_moves.py",),
    ),
    # Each rank takes the whole load since the last look for its own.
    Mutant(
        "moe_layer/trainable/balance.py",
        "is_first = dist.get_rank(self._group) == 0",
        "is_first = True",
        (f"{L}train_checkpoint.py",),
    ),
    # What was counted before a restart is forgotten.
    Mutant(
        "moe_layer/trainable/balance.py",
        "self._seen_LE = load_LE - window_LE.to(load_LE.device) if is_first else load_LE",
        "self._seen_LE = load_LE",
        (f"{L}train_checkpoint.py",),
    ),
    # An expert that stays is said to have moved.
    Mutant("moe_layer/trainable/balance.py", "left.remove(expert)", "left.remove(left[0])", (f"{L}training_moves.py",)),
    # Ids past the last expert are computed by one of them.
    Mutant(
        "kernels/moe_kernels/experts.py",
        "exists = (expert_ids_TK >= 0) & (expert_ids_TK < num_experts)",
        "exists = expert_ids_TK >= 0",
        (f"{K}experts.py",),
    ),
    # A step that has something to do is passed over.
    Mutant(
        "eplb/load_window.py",
        "later = [sample for sample in (*self._sample_at, self._interval) if sample > position]",
        "later = [self._interval]",
        (f"{E}load_window.py", f"{E}controller.py"),
    ),
    # A bound of bytes earns while it is spent.
    Mutant(
        "eplb/relocation/communicator/pace.py", "self._budget -= piece", "self.look()", (f"{E}communicator_pieces.py",)
    ),
    # Gradients of experts are sums where others are means.
    Mutant(
        "moe_layer/forward/executors.py",
        "divisor = experts.gradient_divisor or 1",
        "divisor = 1",
        (f"{L}training_ranks.py",),
    ),
    # The gradient of x is divided too.
    Mutant(
        "moe_layer/forward/divided.py",
        "rows_RH=_ScaleGradient.apply(rows.rows_RH, divisor),",
        "rows_RH=rows.rows_RH,",
        (f"{L}training_ranks.py",),
    ),
    # A router's gradient through its weights is divided too.
    Mutant(
        "moe_layer/forward/divided.py",
        "row_weights_N=_ScaleGradient.apply(rows.row_weights_N, divisor),",
        "row_weights_N=rows.row_weights_N,",
        (f"{L}training_ranks.py",),
    ),
    # Each rank clips by the norm of its own experts.
    Mutant(
        "moe_layer/training/clip_grad.py",
        "yield parameter, (*_sharded_over(parameter), *experts.get(id(parameter), ()))",
        "yield parameter, _sharded_over(parameter)",
        (f"{L}training_ranks.py",),
    ),
    # FSDP2's shards count on their own rank alone.
    Mutant(
        "moe_layer/training/clip_grad.py",
        "if isinstance(placement, Shard) and mesh.size(dim) > 1",
        "if isinstance(placement, Shard) and mesh.size(dim) > 2",
        (f"{L}training_ranks.py",),
    ),
    # A rank with fewer tokens weighs as much as the others.
    Mutant(
        "moe_layer/training/losses.py",
        "tokens_1, counts_E = sums[:1], sums[1:]",
        "tokens_1, counts_E = tokens_1 * num_ranks, sums[1:]",
        (f"{L}training_ranks.py",),
    ),
    # Scores of padding count.
    Mutant(
        "moe_layer/training/losses.py",
        "scores_TE = scores_TE.masked_fill(~mask_T[:, None], 0)",
        "scores_TE = scores_TE",
        (f"{L}training.py",),
    ),
    # The bias goes the wrong way.
    Mutant(
        "moe_layer/training/correction_bias.py",
        "return bias_E.sub_(above_E.sign().float(), alpha=rate)",
        "return bias_E.add_(above_E.sign().float(), alpha=rate)",
        (f"{L}training.py",),
    ),
    # The mean over one batch that all ranks hold is divided once more.
    Mutant(
        "moe_layer/trainable/ddp.py",
        'return 1 if getattr(experts, "tokens", "own") == "replicated" else len(ranks)',
        "return len(ranks)",
        ("tests/moe_layer/hf/test_ranks.py",),
    ),
    # DDP does not hear of a swapped model's experts.
    Mutant(
        "moe_layer/trainable/ddp.py",
        'ignored += [f"{prefix}{one}" for one, _ in experts.named_parameters()]',
        "pass",
        ("tests/moe_layer/hf/test_ranks.py",),
    ),
)

QUANTISED = (
    # Scales that would be left out of the record are read from elsewhere: weights alone are taken for whole.
    Mutant(
        "moe_layer/weights/expert_format.py",
        "if given and len(given) < len(matrix.tensors):",
        "if False:",
        (f"{L}quantised.py",),
    ),
    # A cast takes the scales along.
    Mutant(
        "moe_layer/weights/expert_format.py",
        "return [ExpertTensor(one.name, one.shape, one.dtype, roles[one.name], follows_casts=False) for one in specs]",
        "return [ExpertTensor(one.name, one.shape, one.dtype, roles[one.name]) for one in specs]",
        (f"{L}quantised.py",),
    ),
    # A state dict of floats is cast to e4m3, and nobody hears of it.
    Mutant(
        "moe_layer/weights/slot_experts.py",
        "if spec.name in exact and value.dtype != spec.dtype",
        "if False",
        (f"{L}quantised.py",),
    ),
    # Gate and up rows stay interleaved, of weights and scales alike.
    Mutant(
        "moe_layer/checkpoint/quantised.py",
        "turns = is_interleaved and len(parts) == 1 and matrix.num_parts == 2",
        "turns = False",
        (f"{L}quantised_checkpoint.py",),
    ),
    # Scales are rounded to what the checkpoint has.
    Mutant(
        "moe_layer/checkpoint/exactly.py",
        "if not torch.equal(cast.to(tensor.dtype), tensor):",
        "if False:",
        (f"{L}quantised_checkpoint.py",),
    ),
    # Signed zero points are taken for codes.
    Mutant(
        "moe_layer/checkpoint/stored.py",
        "return (stored + 8).to(torch.uint8)",
        "return stored.to(torch.uint8)",
        (f"{L}quantised_checkpoint.py",),
    ),
    # Blocks of 128 rows go on from the gate's rows into the up projection's.
    Mutant(
        "moe_layer/weights/quantisation.py",
        "return dequantise(*stored, self.scheme, blocks_of=len(tensors[name]) // num_parts)",
        "return dequantise(*stored, self.scheme)",
        (f"{L}quantised_checkpoint.py",),
    ),
    # A move leaves the end of the record behind, where scales are.
    Mutant(
        "eplb/relocation/communicator/local.py",
        "transfer.target.copy_(transfer.source, non_blocking=True)",
        "transfer.target[:-256].copy_(transfer.source[:-256], non_blocking=True)",
        (f"{L}quantised.py",),
    ),
    # Nothing keeps transformers from saving records as floats.
    Mutant(
        "moe_layer/hf/swap.py",
        "refuse_saving(model)",
        "pass",
        ("tests/moe_layer/hf/test_quantised.py",),
    ),
)

MUTANTS = (
    *RELOCATION, *LOAD, *ROUNDS, *WORKER, *CONTROLLER, *PLANNING, *LAYER, *BATCH_SHARES, *KERNELS, *ONE_SIDED,
    *GRADIENTS, *TRAINING, *QUANTISED,
)  # fmt: skip
