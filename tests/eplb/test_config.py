"""`EplbConfig`: the defaults work, and every combination that cannot is refused with the rule it breaks."""

import math

import pytest
from pydantic import ValidationError

from eplb import EplbConfig
from eplb.config import QUIET_BYTES_PER_SECOND
from eplb.relocation.communicator import COMMUNICATORS


class Policy:
    def propose(self, load_LNE, physical_LWP, topology):
        raise NotImplementedError


def test_the_defaults_work():
    config = EplbConfig()
    assert (config.use_async, config.communicator, config.policy) == (True, "auto", "adaptive")
    assert config.step_interval >= config.window_size >= config.window_samples >= 1


def test_what_works():
    for options in (
        {"step_interval": 1, "window_size": 1, "window_samples": 1},
        {"step_interval": 512, "window_size": 128},
        {"policy": "static", "policy_options": {"balance_shares": True}},
        {"policy": Policy()},
        {"policy": "deepseek"},
        {"communicator": "torch_nccl"},
        {"communicator": "symm_mem", "max_bytes_per_second": 1},
        {"communicator": "nixl", "max_bytes_per_second": 1},
        {"max_bytes_per_second": 10**12},
        {"communicator": "torch_gloo", "max_bytes_per_second": None},
        {"communicator": "torch_gloo", "max_bytes_per_second": "auto"},
        {"max_bytes_in_flight": 1},
        {"round_interval": 0.2, "heartbeat_interval": 0.2},
        {"backoff": 60.0, "max_backoff": 60.0},
        {"min_gain": 0.0},
        {"log_balancedness": True, "log_balancedness_interval": 5},
        {"num_redundant_experts": 0},
    ):
        EplbConfig(**options)


REFUSED = {
    # Two knobs that do not go together.
    "window_size > step_interval": (
        {"step_interval": 10, "window_size": 11},
        "window_size=11 must be <= step_interval=10: a window ends where the next interval begins",
    ),
    "min_gain twice": (
        {"min_gain": 0.2, "policy_options": {"min_gain": 0.01}},
        r"min_gain=0.2 and policy_options=\{'min_gain': 0.01\}: it is given twice",
    ),
    "min_gain twice, once as it is by default": (
        {"min_gain": 0.003, "policy_options": {"min_gain": 0.01}},
        "it is given twice",
    ),
    "window_samples > window_size": (
        {"window_size": 3, "window_samples": 4},
        "window_samples=4 must be <= window_size=3: a sub-window has at least one step",
    ),
    "round_interval > heartbeat_interval": (
        {"round_interval": 0.3, "heartbeat_interval": 0.2},
        "round_interval=0.3 must be <= heartbeat_interval=0.2: an idle worker speaks less often",
    ),
    "heartbeat_interval = peer_timeout": (
        {"heartbeat_interval": 3.0, "peer_timeout": 3.0},
        "heartbeat_interval=3.0 must be < peer_timeout=3.0: a live peer must be heard in time",
    ),
    "backoff > max_backoff": (
        {"backoff": 61.0, "max_backoff": 60.0},
        "backoff=61.0 must be <= max_backoff=60.0: the first delay is the shortest",
    ),
    "an interval of what is not logged": (
        {"log_balancedness_interval": 10},
        "log_balancedness_interval=10 needs log_balancedness=True: nothing is logged",
    ),
    "the same, said": (
        {"log_balancedness": False, "log_balancedness_interval": 10},
        "log_balancedness_interval=10 needs log_balancedness=True",
    ),
    "min_gain of a policy that has none": ({"min_gain": 0.1, "policy": "static"}, "min_gain=0.1.*policy.*'static'"),
    "min_gain of a policy object": ({"min_gain": 0.1, "policy": Policy()}, "min_gain=0.1"),
    "options of a policy object": ({"policy": Policy(), "policy_options": {"a": 1}}, "options.*object"),
    "options that the policy does not take": (
        {"policy": "static", "policy_options": {"speed": 3}},
        "policy_options.*speed.*static|policy.*static.*speed",
    ),
    # Names.
    "unknown communicator": (
        {"communicator": "carrier_pigeon"},
        f"communicator must be one of {', '.join(COMMUNICATORS)}, got 'carrier_pigeon'",
    ),
    "a bound that the communicator cannot keep": (
        {"communicator": "torch_gloo", "max_bytes_per_second": 1},
        "max_bytes_per_second=1 needs communicator='symm_mem', 'nixl' or 'auto', got communicator='torch_gloo'",
    ),
    "unknown policy": ({"policy": "greedy"}, "policy='greedy': unknown; known policies: adaptive, deepseek, static"),
    "no policy": ({"policy": 7}, "policy.*7.*propose"),
    "a policy's class without propose": ({"policy": object()}, "policy.*object.*propose"),
    "unknown knob": ({"interval": 7}, r"(?s)interval.*Extra inputs are not permitted"),
    # One knob alone.
    **{
        f"{name}={value}": ({name: value}, f"(?s){name}.*greater than or equal to {least}")
        for name, least in (
            *(("step_interval", 1), ("window_size", 1), ("window_samples", 1), ("log_balancedness_interval", 1)),
            *(("ranks_per_node", 1), ("num_groups", 1), ("num_redundant_experts", 0), ("min_gain", 0)),
        )
        for value in (least - 1, -7)
    },
    **{
        f"{name}={value}": ({name: value}, f"(?s){name}.*(greater than 0|finite)")
        for name in (
            *("round_interval", "heartbeat_interval", "peer_timeout", "transfer_timeout", "grace_timeout"),
            *("connect_timeout", "planning_timeout", "quiesce_timeout", "close_timeout", "backoff", "max_backoff"),
        )
        for value in (0.0, -1.0, math.inf, math.nan)
    },
    "max_bytes_per_second=0": ({"max_bytes_per_second": 0}, "(?s)max_bytes_per_second.*greater than 0"),
    "max_bytes_per_second='slow'": ({"max_bytes_per_second": "slow"}, "(?s)max_bytes_per_second.*'auto'"),
    "max_bytes_in_flight=0": ({"max_bytes_in_flight": 0}, "(?s)max_bytes_in_flight.*greater than 0"),
    "min_gain=nan": ({"min_gain": math.nan}, "(?s)min_gain.*finite"),
    "step_interval=1.5": ({"step_interval": 1.5}, "(?s)step_interval.*integer"),
    **{
        f"{name}={value}": ({name: value}, f"{name}={value} must not be a bool")
        for name in ("step_interval", "num_redundant_experts", "max_bytes_per_second", "min_gain", "peer_timeout")
        for value in (False, True)
    },
    "use_async='perhaps'": ({"use_async": "perhaps"}, "(?s)use_async.*boolean"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_rule(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        EplbConfig(**options)


@pytest.mark.parametrize(
    ("given", "derived"),
    [
        ({"step_interval": 512}, {"window_size": 512, "window_samples": 4}),
        ({"step_interval": 2}, {"window_size": 2, "window_samples": 2}),
        ({"window_size": 3}, {"step_interval": 3000, "window_samples": 3}),
        ({"window_size": 5000}, {"step_interval": 5000, "window_samples": 4}),
        ({"window_samples": 2000}, {"step_interval": 3000, "window_size": 2000}),
        ({"window_samples": 4000}, {"step_interval": 4000, "window_size": 4000}),
        ({"peer_timeout": 0.1}, {"heartbeat_interval": 0.05, "round_interval": 0.02}),
        ({"heartbeat_interval": 40.0}, {"peer_timeout": 80.0, "round_interval": 0.02}),
        ({"round_interval": 0.4, "peer_timeout": 0.5}, {"heartbeat_interval": 0.4}),
        ({"backoff": 100.0}, {"max_backoff": 100.0}),
        ({"max_backoff": 0.5}, {"backoff": 0.5}),
        ({"policy_options": {"min_gain": 0.01}}, {"min_gain": 0.01}),
    ],
    ids=str,
)
def test_a_default_makes_nothing_invalid_that_was_given(given, derived):
    config = EplbConfig(**given)
    for name, value in {**given, **derived}.items():
        assert getattr(config, name) == value, name
    assert EplbConfig(**config.model_dump()) == config == EplbConfig.model_validate_json(config.model_dump_json())


def test_frozen():
    config = EplbConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.step_interval = 7


@pytest.mark.parametrize("options", [{}, {"policy": "static"}, {"min_gain": 0.1}, {"log_balancedness": True}], ids=str)
def test_what_was_dumped_can_be_read(options):
    config = EplbConfig(**options)
    assert EplbConfig(**config.model_dump()) == config == EplbConfig.model_validate_json(config.model_dump_json())


def test_every_knob_is_described():
    for name in EplbConfig.model_fields:
        assert name in (EplbConfig.__doc__ or ""), f"{name} is not in the docstring"


@pytest.mark.parametrize(
    ("given", "required", "kept"),
    [
        ({}, None, QUIET_BYTES_PER_SECOND),
        ({"max_bytes_per_second": 5}, 5, 5),
        ({"max_bytes_per_second": None}, None, None),
    ],
)
def test_the_bound_by_default_is_kept_where_it_can_be_and_required_nowhere(given, required, kept):
    config = EplbConfig(**given)
    assert (config.required_bytes_per_second, config.bytes_per_second) == (required, kept)
    assert EplbConfig.model_validate_json(config.model_dump_json()) == config
