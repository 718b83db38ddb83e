"""`TrainingState`: weights and optimizer state for `torch.distributed.checkpoint`, to be read by any number of ranks.

Every rank has other experts under the same names. Here they become rows of one tensor over all ranks, and so do their moments:
`DTensor`s over the memory that is there, without a copy.

Legend: E logical experts, W ranks, O = E / W experts that each rank owns.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from eplb.planning.placement import Placement
from moe_kernels.base.checks import check_kind
from moe_layer.collectives import all_gather_rows
from moe_layer.trainable.balance import TrainingBalancer
from moe_layer.trainable.trainable_experts import TrainableExperts

_logger = logging.getLogger(__name__)

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # of torch.compile and of activation checkpointing


class TrainingState(Stateful):
    """Weights and optimizer state of a model with trainable layers, to be saved by W ranks and read by another number.

    ::

        state = TrainingState(model, optimizer)
        dcp.save({"training": state, "step": step}, checkpoint_id=folder)  # torch.distributed.checkpoint
        …
        state = TrainingState(new_model, new_optimizer)  # on more or fewer ranks, under any placement
        dcp.load({"training": state}, checkpoint_id=folder)

    An expert's weights ``[O, *shape]`` of each rank are saved as one tensor ``[E, *shape]``, and so is each tensor of its
    optimizer state with as many rows; each rank reads its own rows. All else is as PyTorch's `get_model_state_dict` and
    `get_optimizer_state_dict` make it: names without the wrappers of DDP and `torch.compile`, FSDP2's shards as such. What is
    neither an expert nor sharded must be equal on all ranks, as under DDP: one rank's is saved.

    Saving changes nothing. Optimizers that have not stepped yet can be saved and loaded. `dcp.load` writes into the weights and
    the state that are there; if it fails, they are half-written. Settings of an optimizer are those that were saved, but
    `foreach` and `fused` stay its own: how to step depends on the machine and on what wraps the model.

    The experts' copies follow in the next forward. Experts of a layer with as many ranks and lanes as there were also compute
    where they did, so that training goes on bit for bit, with replicas too; others stay where they are. With `balancer`, what
    it has counted is saved too: on any number of ranks it looks at the same load in the same steps as without the
    interruption. Where a model has several copies (data parallel over groups of ranks), placements and counts are those of
    one of them.

    `dcp.save` and `dcp.load` are collective over the ranks that have the model. `dcp.load` raises `CheckpointException`, which
    names the key, if the checkpoint lacks it ("Missing key") or has other sizes ("Size mismatch"). `state_dict()` and
    `load_state_dict()` are theirs to call.

    Args:
        model: also wrapped in DDP or FSDP2. Build it, wrap it and put it on its device first.
        optimizers: one or several, over parameters of `model`.
        balancer: of layers of `model`. A checkpoint saved without one cannot be read with one (its key is missing); the other
            way round, what was counted is not read.

    Raises:
        ValueError: an optimizer has parameters, or the balancer layers, that are not the model's. When saving or loading:
            experts that are spread over ranks are on the meta device or sharded once more, or have optimizer state that
            cannot be divided by experts; or the balancer's state is of other numbers of layers or experts.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        balancer: TrainingBalancer | None = None,
    ) -> None:
        check_kind("model", model, nn.Module)
        self.model, self.balancer = model, balancer
        check_kind("optimizers", optimizers, (Optimizer, Iterable))
        self.optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        for one in self.optimizers:
            check_kind("optimizers", one, Optimizer)
        if balancer is not None:
            check_kind("balancer", balancer, TrainingBalancer)
        known = {id(parameter) for parameter in model.parameters()}
        foreign = [tuple(one.shape) for one in self._optimized() if id(one) not in known]
        if foreign:
            raise ValueError(
                f"optimizers must be over parameters of model, got {len(foreign)} others, the first of shape {foreign[0]}: "
                "make the optimizer after fully_shard() and after the model has its device"
            )
        if balancer is not None and not set(balancer.layers) <= set(model.modules()):
            raise ValueError("balancer must be of layers of model, got one of other layers")

    def state_dict(self) -> dict[str, Any]:
        """What `dcp.save` writes, and what `dcp.load` writes into."""
        homes, names = self._spread(), self._names()
        for experts in homes.values():
            experts.copies.check_nothing_waits("TrainingState")
        with _one_by_one(self.optimizers) as loops, _state_for_all(self.optimizers) as made_up:
            weights = get_model_state_dict(self.model)
            optimizer: dict[str, Any] = get_optimizer_state_dict(self.model, self.optimizers)
            without_state = sorted(names[parameter] for parameter in made_up)
        for group, own in zip(optimizer["param_groups"], loops, strict=True):
            group.update(own)
        for experts in homes.values():
            experts.copies.note_as_sent()
        meshes: dict[dist.ProcessGroup, DeviceMesh] = {}
        for name, experts in homes.items():
            group = experts.process_group
            assert group is not None
            if group not in meshes:
                meshes[group] = DeviceMesh.from_group(group, experts.device.type)
            shard = _Sharder(name, experts.owned.num_owned, meshes[group])
            weights[name] = shard(name, weights[name])
            if name in optimizer["state"]:
                optimizer["state"][name] = {key: shard(key, one) for key, one in optimizer["state"][name].items()}
        state: dict[str, Any] = {"model": weights, "optimizer": optimizer, "without_state": without_state}
        # One text, because layers and ranks may be others when it is read.
        state["placements"] = json.dumps({name: _placed(one) for name, one in self._layers().items()})
        return state if self.balancer is None else {**state, "balancer": json.dumps(self.balancer.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `dcp.load` has read into a `state_dict()` of this object."""
        homes, names = self._spread(), self._names()
        weights, state = dict(state_dict["model"]), dict(state_dict["optimizer"]["state"])
        for name in homes:
            weights[name] = _local(weights[name])
            if name in state:
                state[name] = {key: _local(one) for key, one in state[name].items()}
        set_model_state_dict(self.model, weights)
        for optimizer in self.optimizers:
            for parameter in _without_state(optimizer):
                if names[parameter] in state:  # else PyTorch makes up another state, only to throw it away
                    optimizer.state[parameter] = dict(state[names[parameter]])
        with _one_by_one(self.optimizers) as loops:
            saved = state_dict["optimizer"]["param_groups"]
            groups = [{**group, **own} for group, own in zip(saved, loops, strict=True)]
            set_optimizer_state_dict(self.model, self.optimizers, {"state": state, "param_groups": groups})
        fresh = set(state_dict["without_state"])
        for optimizer in self.optimizers:
            _forget(optimizer, [one for one in _parameters(optimizer) if names[one] in fresh])
        self._place(json.loads(state_dict["placements"]))
        if self.balancer is not None:  # after the load counters, of which it counts a difference
            self.balancer.load_state_dict(json.loads(state_dict["balancer"]))

    def _place(self, saved: dict[str, dict[str, list[list[float]]]]) -> None:
        """Let experts compute where they did, in layers that have as many ranks and lanes."""
        layers, placed = self._layers(), set()
        for name, experts in layers.items():
            lanes_WS = np.array(saved[name]["experts"], dtype=np.int64) if name in saved else np.empty((0, 0))
            if lanes_WS.shape == experts.owned.placement.lanes_WS.shape:
                experts.place(Placement(lanes_WS, experts.num_experts), np.array(saved[name]["shares"]))
                experts.owned.load_E.copy_(torch.tensor(saved[name]["load"][experts.owned.rank], dtype=torch.int64))
                placed.add(name)
        left = sorted((saved.keys() | layers.keys()) - placed)
        if left:
            _logger.info("not placed as they were saved, because their numbers of ranks or lanes differ: %s", left)

    def _layers(self) -> dict[str, TrainableExperts]:
        """Experts that are spread over ranks, by the names of their modules in the checkpoint."""
        return {
            _plain_name(self.model, prefix): module
            for prefix, module in self.model.named_modules()
            if isinstance(module, TrainableExperts) and module.owned.num_ranks > 1
        }

    def _optimized(self) -> Iterator[nn.Parameter]:
        for optimizer in self.optimizers:
            yield from _parameters(optimizer)

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: _plain_name(self.model, name) for name, parameter in self.model.named_parameters()}

    def _spread(self) -> dict[str, TrainableExperts]:
        """The experts of each parameter that has other rows on each rank, by its name in the checkpoint."""
        homes = {}
        for prefix, module in self._layers().items():
            for tensor in module.format.tensors:
                parameter = getattr(module, tensor.name)
                name = f"{prefix}.{tensor.name}" if prefix else tensor.name
                if parameter.is_meta or isinstance(parameter, DTensor):
                    what = "on the meta device" if parameter.is_meta else "a DTensor, sharded once more"
                    raise ValueError(
                        f"{name} must be a plain tensor of this rank's experts, to be saved or loaded; it is {what}"
                    )
                homes[name] = module
        return homes


class _Sharder:
    """Makes this rank's rows of an expert parameter, and of its optimizer state, part of a tensor over all ranks."""

    def __init__(self, name: str, num_owned: int, mesh: DeviceMesh) -> None:
        self._name, self._num_owned, self._mesh = name, num_owned, mesh

    def __call__(self, key: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value  # a step count, equal on all ranks
        if value.shape[0] != self._num_owned or value.dim() == 1:
            raise ValueError(
                f"optimizer state {key!r} of {self._name} must be a scalar or have a row for each of this rank's "
                f"{self._num_owned} experts, to be read by other numbers of ranks; got shape {tuple(value.shape)}"
            )
        return DTensor.from_local(value.detach(), self._mesh, [Shard(0)], run_check=False)


def _placed(experts: TrainableExperts) -> dict[str, list[list[float]]]:
    """Where experts compute, and each rank's counts, by which an expert's replicas take turns. Collective.

    JSON writes floats so that they are read back as they were.
    """
    owned, group = experts.owned, experts.process_group
    assert group is not None
    load_WE = all_gather_rows(owned.load_E[None], group)
    return {
        "experts": owned.placement.lanes_WS.tolist(),
        "shares": owned.shares_WS.tolist(),
        "load": load_WE.tolist(),
    }


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _plain_name(model: nn.Module, name: str) -> str:
    """The name of a parameter as `get_model_state_dict` has it: without those of wrapping modules."""
    kept: list[str] = []
    module: Any = model
    for part in name.split("."):
        if not isinstance(module, DistributedDataParallel) and part not in _WRAPPERS:
            kept.append(part)
        module = getattr(module, part)
    return ".".join(kept)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _without_state(optimizer: Optimizer) -> list[nn.Parameter]:
    return [one for one in _parameters(optimizer) if one.requires_grad and not optimizer.state.get(one)]


@contextmanager
def _state_for_all(optimizers: Iterable[Optimizer]) -> Iterator[list[nn.Parameter]]:
    """Inside, parameters without optimizer state (these are yielded) have what a step with gradients of 0 makes.

    Such a state is what `dcp.load` reads into. It is no state to go on from, as its step count is 1.
    """
    made_up = [(optimizer, _without_state(optimizer)) for optimizer in optimizers]
    try:
        for optimizer, lacking in made_up:
            if lacking:
                _step_by_nothing(optimizer, lacking)
        yield [parameter for _, lacking in made_up for parameter in lacking]
    finally:
        for optimizer, lacking in made_up:
            _forget(optimizer, lacking)


_LOOPS = ("foreach", "fused")  # how an optimizer goes through its parameters


@contextmanager
def _one_by_one(optimizers: Sequence[Optimizer]) -> Iterator[list[dict[str, Any]]]:
    """Inside, steps take one parameter at a time; afterwards groups have the `foreach` and `fused` (yielded) of before.

    With `foreach`, the default on a GPU, PyTorch takes lists of them, and refuses lists that mix `DTensor`s and experts.
    """
    own = [[{key: group[key] for key in _LOOPS if key in group} for group in one.param_groups] for one in optimizers]
    try:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if "foreach" in group and not group.get("fused"):
                    group["foreach"] = False
        yield [loops for of_one in own for loops in of_one]
    finally:
        for optimizer, of_one in zip(optimizers, own, strict=True):
            for group, loops in zip(optimizer.param_groups, of_one, strict=True):  # loading has replaced the groups
                group.update(loops)


def _forget(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


@torch.no_grad()
def _step_by_nothing(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """A step of learning rate 0 with gradients of 0 for `parameters`, none for others: it writes no weight."""
    grads = [(parameter, parameter.grad) for parameter in _parameters(optimizer)]
    rates = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
    try:
        for parameter, _ in grads:
            parameter.grad = None
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for group, rate in rates:
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, torch.Tensor) else 0.0
        optimizer.step()
    finally:
        for group, rate in rates:
            group["lr"] = rate
        for parameter, grad in grads:
            parameter.grad = grad
