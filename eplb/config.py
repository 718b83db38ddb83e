"""`EplbConfig`: every knob of the rebalancer, its unit and its rule. All steps of a rebalance read it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eplb.planning.policy import Policy, make_policy
from eplb.relocation.communicator import COMMUNICATORS, KEEP_A_BOUND

QUIET_BYTES_PER_SECOND = 12_000_000_000
"""That a rank copies while it serves, if nothing else is asked for: on an H200 about 1 % of its time (docs/design.md)."""

PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class EplbConfig(BaseModel):
    """How expert-parallel load balancing (EPLB) goes about its work.

    Attributes:
        step_interval: steps (calls of `EplbController.step()`) between two looks at the load.
        window_size: steps before each look whose load counts; at most `step_interval`, 1000 by default.
        window_samples: sub-windows that the policy sees of each window, to tell drift from noise; at most `window_size`.
        forecast_windows: the last windows, at most so many, from which rank 0 forecasts the load of the next one: it smooths
            noise, follows changes, and goes on with trends (`eplb.planning.forecast`). 1: it gets the last window itself.
        use_async: relocate in the background; False does the same inside `step()`, which is then collective.
        policy: name of a registered policy, or an object with its `propose()`, which is called where `planning` says.
        policy_options: keyword arguments of the named policy.
        planning: where rank 0 plans. "process": in a process of its own, to which the policy is pickled, so that planning never
            holds this process's interpreter. "thread": beside the forwards; the policy object is the caller's own. "auto": a
            process for a policy that is named, a thread for an object, whose owner may look at it, and inside `step()`.
        communicator: how experts travel: "symm_mem" (each rank fetches from the others' memory; one host), "torch_nccl" (not
            beside NCCL dispatch), "torch_gloo" (through host memory; always works), or "auto": the first of these that can be
            used; which one and why is logged. "auto" takes neither "nccl" (as "torch_nccl", through nccl4py) nor "nixl" (each
            rank reads the others' memory through NIXL). These need the extras of their names (docs/design.md).
        min_gain: of the policy "adaptive": how far a layer's largest rank load may be above the best that there is, as
            a fraction of it, before experts move. (Few move besides, to spread the hottest: its option `spread`, 0 for none.)
        max_bytes_in_flight: bytes that all ranks together move in one wave; None for no bound but the free slots.
        max_bytes_per_second: that each rank copies to its slots at most, so that forwards keep the rest of the links and of the
            memory's bandwidth (docs/design.md says what a GB costs). A number is kept or refused: it needs "symm_mem", as a
            communicator or by "auto", or "nixl". "auto": `QUIET_BYTES_PER_SECOND` with these, no bound with the others. None
            for no bound: as fast as the copy engines are. Else the worker keeps out of the main thread's next step, too.
        ranks_per_node: for policies that prefer to stay inside a node; None if all ranks are on one.
        num_groups: groups of experts for node-limited routing; 1 if there are none.
        num_redundant_experts: asserts what the registered layers were built with; None asserts nothing.
        load_trace_windows: load windows that `EplbController.save_load_trace()` finds; older ones are forgotten. One takes
            8 bytes for each sub-window, layer and expert.
        log_balancedness: whether rank 0 logs the balancedness (mean/max of the ranks' loads, averaged over layers).
        log_balancedness_interval: steps between two such lines.
        round_interval: seconds between two rounds of the workers while a relocation is under way and no rank has news. No
            relocation waits for it: what a rank has done it says at once.
        heartbeat_interval: seconds between two rounds while none is; at least `round_interval`.
        connect_timeout: seconds after which a rank that has not come to its first `step()` is shown as unreachable, and
            which connecting may take once all have come.
        planning_timeout: seconds after which a policy that does not return is given up, with its proposal.
        peer_timeout: seconds after which a rank that takes part in no round is shown as unreachable; more than
            `heartbeat_interval`.
        transfer_timeout: seconds after which a wave's transfers are given up and their slots quarantined.
        grace_timeout: seconds after which a main thread that does not flip is shown as stalled.
        quiesce_timeout: seconds that loading weights waits for relocations under way.
        close_timeout: seconds that `close()` waits at most to tell the other ranks.
        backoff, max_backoff: seconds to wait after a failure, doubled with each further one up to the maximum. A wave
            waits about `backoff` for a slot that another controller of the same pool holds.

    A default never makes a value that was given invalid: knobs that were not given adapt to those that were. So
    ``EplbConfig(step_interval=512)`` has a `window_size` of 512, and ``EplbConfig(window_size=5000)`` steps 5000 times
    between two looks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    step_interval: int = Field(default=3000, ge=1)
    window_size: int = Field(default=1000, ge=1)
    window_samples: int = Field(default=4, ge=1)
    forecast_windows: int = Field(default=8, ge=1)
    use_async: bool = True
    policy: Any = "adaptive"
    policy_options: dict[str, Any] = Field(default_factory=dict)
    planning: Literal["auto", "process", "thread"] = "auto"
    communicator: str = "auto"
    min_gain: float = Field(default=0.003, ge=0, allow_inf_nan=False)
    max_bytes_in_flight: int | None = Field(default=None, gt=0)
    max_bytes_per_second: Annotated[int, Field(gt=0)] | Literal["auto"] | None = "auto"
    ranks_per_node: int | None = Field(default=None, ge=1)
    num_groups: int = Field(default=1, ge=1)
    num_redundant_experts: int | None = Field(default=None, ge=0)
    load_trace_windows: int = Field(default=16, ge=0)
    log_balancedness: bool = False
    log_balancedness_interval: int = Field(default=1000, ge=1)
    round_interval: PositiveSeconds = 0.02
    heartbeat_interval: PositiveSeconds = 0.2
    connect_timeout: PositiveSeconds = 60.0
    planning_timeout: PositiveSeconds = 60.0
    peer_timeout: PositiveSeconds = 30.0
    transfer_timeout: PositiveSeconds = 60.0
    grace_timeout: PositiveSeconds = 30.0
    quiesce_timeout: PositiveSeconds = 120.0
    close_timeout: PositiveSeconds = 5.0
    backoff: PositiveSeconds = 1.0
    max_backoff: PositiveSeconds = 60.0

    @model_validator(mode="before")
    @classmethod
    def _refuse_bools(cls, given: Any) -> Any:
        """As numbers: pydantic takes True for 1."""
        for name, field in cls.model_fields.items():
            if isinstance(given, dict) and isinstance(given.get(name), bool) and field.annotation is not bool:
                raise ValueError(f"{name}={given[name]} must not be a bool")
        return given

    @model_validator(mode="after")
    def _derive(self) -> "EplbConfig":
        """Move knobs that were not given to where those that were allow them. Runs before the check."""
        _fit(self, ["window_samples", "window_size", "step_interval"])
        _fit(self, ["round_interval", "heartbeat_interval", "peer_timeout"], ratio=2)
        _fit(self, ["backoff", "max_backoff"])
        own = self.policy_options.get("min_gain")
        if own is not None and self.policy == "adaptive":
            if "min_gain" in self.model_fields_set and self.min_gain != own:
                raise ValueError(
                    f"min_gain={self.min_gain} and policy_options={self.policy_options}: it is given twice"
                )
            self.__dict__["min_gain"] = own
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> "EplbConfig":
        _require(self, "window_size", "<=", "step_interval", "a window ends where the next interval begins")
        _require(self, "window_samples", "<=", "window_size", "a sub-window has at least one step")
        _require(self, "round_interval", "<=", "heartbeat_interval", "an idle worker speaks less often")
        _require(self, "heartbeat_interval", "<", "peer_timeout", "a live peer must be heard in time")
        _require(self, "backoff", "<=", "max_backoff", "the first delay is the shortest")
        if self.communicator not in COMMUNICATORS:
            raise ValueError(f"communicator must be one of {', '.join(COMMUNICATORS)}, got {self.communicator!r}")
        if self.required_bytes_per_second is not None and self.communicator not in ("auto", *KEEP_A_BOUND):
            raise ValueError(
                f"max_bytes_per_second={self.max_bytes_per_second} needs communicator='symm_mem', 'nixl' or 'auto', "
                f"got communicator={self.communicator!r}: the others cannot keep it"
            )
        # By value, not by whether it was given: what is dumped and read again has everything given.
        if _differs_from_default(self, "min_gain") and self.policy != "adaptive":
            raise ValueError(
                f"min_gain={self.min_gain} needs policy='adaptive', got policy={self.policy!r}: it is its own"
            )
        self.make_policy()
        if _differs_from_default(self, "log_balancedness_interval") and not self.log_balancedness:
            raise ValueError(
                f"log_balancedness_interval={self.log_balancedness_interval} needs log_balancedness=True: nothing is logged"
            )
        return self

    @property
    def required_bytes_per_second(self) -> int | None:
        """The bound that a communicator must be able to keep; None if it need not keep any."""
        return None if self.max_bytes_per_second == "auto" else self.max_bytes_per_second

    @property
    def bytes_per_second(self) -> int | None:
        """The bound of a communicator that can keep one; None for no bound."""
        return QUIET_BYTES_PER_SECOND if self.max_bytes_per_second == "auto" else self.max_bytes_per_second

    def make_policy(self) -> Policy:
        """A policy as configured.

        Raises:
            ValueError: unknown name, options that it does not take, or an object without `propose()`.
        """
        options = dict(self.policy_options)
        if self.policy == "adaptive":
            options.setdefault("min_gain", self.min_gain)
        try:
            return make_policy(self.policy, **options)
        except TypeError as error:
            raise ValueError(
                f"policy_options={self.policy_options} do not fit policy={self.policy!r}: {error}"
            ) from error


def _differs_from_default(config: EplbConfig, name: str) -> bool:
    return bool(getattr(config, name) != EplbConfig.model_fields[name].default)


def _fit(config: EplbConfig, names: list[str], ratio: int = 1) -> None:
    """Keep the knobs in ascending order by moving those that were not given; neighbours `ratio` apart where there is room."""
    given = {name: getattr(config, name) for name in names if name in config.model_fields_set}
    for index, name in enumerate(names):
        if name not in given:
            value = getattr(config, name)
            kind = type(value)
            for behind, other in enumerate(names[index + 1 :], start=1):
                if other in given:
                    value = min(value, kind(given[other] / ratio**behind))
            for other in names[:index]:
                if other in given:
                    value = max(value, given[other] * (ratio if name == names[-1] else 1))
            config.__dict__[name] = value


def _require(config: EplbConfig, name: str, relation: str, limit: str, reason: str) -> None:
    value, bound = getattr(config, name), getattr(config, limit)
    if not (value <= bound if relation == "<=" else value < bound):
        raise ValueError(f"{name}={value} must be {relation} {limit}={bound}: {reason}")
