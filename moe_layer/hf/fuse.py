"""Fused routing: lets a model's router choose in our kernel: one launch after its logits, instead of several.

The router stays the module it was, so hooks that record its logits stay in force; only its `forward` is another.
"""

import types
from typing import Any

import torch
from torch import nn

from moe_kernels import topk_routing
from moe_layer.hf.inspect import Understood, find_experts
from moe_layer.hf.routing import NotFusedError, Routing, find_routing, weight_of
from moe_layer.router import RouterRule


def fuse(gate: nn.Module, routing: Routing, backend: str) -> None:
    """Make `gate` choose in our kernel. In training it goes on as it did: it may add noise there.

    `backend` is resolved in each call, for the device that the router is on then.
    """
    vars(gate)["_fused_routing"] = (routing, backend)
    vars(gate)["forward"] = types.MethodType(_fused_forward, gate)


def unfuse(gate: nn.Module) -> None:
    """The reverse of `fuse`."""
    del vars(gate)["forward"], vars(gate)["_fused_routing"]


def _fused_forward(gate: Any, hidden_states: torch.Tensor, *extra: Any) -> tuple[torch.Tensor, ...]:
    """The router's logits, weights (float32) and ids (int32)."""
    if gate.training:
        return type(gate).forward(gate, hidden_states, *extra)
    routing, backend = gate._fused_routing
    x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
    with torch.autocast(x_TH.device.type, enabled=False):
        logits_TE = routing.logits(gate, x_TH, extra)
        weights_TK, ids_TK = topk_routing(
            logits_TE,
            routing.top_k,
            routing.rule.for_kernels,
            bias_E=routing.bias_for_choice(gate, extra),
            backend=backend,
        )
    return logits_TE, weights_TK, ids_TK


class _Listener(nn.Module):
    """In the place of experts: keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: tuple[torch.Tensor, ...] = ()

    def forward(self, hidden_states: torch.Tensor, *choice: torch.Tensor) -> torch.Tensor:
        self.heard = (hidden_states, *choice)
        return torch.zeros_like(hidden_states)


def find_routers(
    model: nn.Module, experts: nn.Module, dtype: torch.dtype, known: dict[Any, Routing | str] | None = None
) -> tuple[nn.Module, Routing] | str:
    """The router that chooses among `experts`, and what it computes; or why it cannot choose in our kernel.

    The router is the child of the experts' block whose ids the experts are given. The block is run on a few random tokens,
    without its experts. `known` keeps what was found of routers of one class with the same attributes.
    """
    known = {} if known is None else known
    parents = [(parent, name) for parent in model.modules() for name, one in parent._modules.items() if one is experts]
    if len(parents) != 1:
        return "several blocks share its experts"
    block, place = parents[0]
    try:
        gate, args, heard, x = _listen(block, place, dtype)
        key = (*_kind(gate), *(_kind(one) for one in args[1:]), dtype, args[0].dim())
        if key not in known:
            try:
                known[key] = find_routing(gate, args[1:], dtype, args[0].dim())
            except NotFusedError as error:
                known[key] = str(error)
        routing = known[key]
        if isinstance(routing, str):
            return routing
        if not x.is_meta:
            _check_in_block(block, place, gate, routing, heard, x)
    except NotFusedError as error:
        return str(error)
    return gate, routing


def find_routings(
    model: nn.Module, understood: dict[str, Understood], fuse_routing: bool | str
) -> tuple[dict[str, tuple[nn.Module, Routing]], dict[str, str]]:
    """The routers that are to choose in our kernel, and why the others are not.

    Raises:
        ValueError: all of them must, and one cannot.
    """
    routings: dict[str, tuple[nn.Module, Routing]] = {}
    not_fused: dict[str, str] = {}
    known: dict[Any, Routing | str] = {}
    for name, one in understood.items() if fuse_routing else ():
        found = find_routers(model, model.get_submodule(name), one.format.dtype, known)
        if isinstance(found, str):
            not_fused[name] = found
        elif fuse_routing == "auto" and found[1].has_ties:
            not_fused[name] = (
                f"its logits are {found[1].logits_dtype}, in which many are equal, and PyTorch's choice among those is open; "
                "fuse_routing=True takes the lowest ids"
            )
        else:
            routings[name] = found
    if fuse_routing is True and not_fused:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in not_fused.items())
        raise ValueError(f"fuse_routing=True needs routers whose rule our kernel has; nothing was changed.{reasons}")
    return routings, not_fused


def rule_of_config(config: Any) -> RouterRule:
    """The rule of the routers of a transformers model with this config, found by trying one of them.

    The model is built without memory ("meta"). `weights_dtype` is that of the config's `dtype`.

    Raises:
        ValueError: the model has no router whose rule our kernel has; says why.
    """
    if not hasattr(config, "get_text_config"):
        raise ValueError(f"config must be of a transformers model, got {config!r}")
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config.get_text_config())
    reasons: list[str] = []
    for name, experts in find_experts(model).items():
        found = find_routers(model, experts, model.dtype)
        if isinstance(found, str):
            reasons.append(f"{name}: {found}")
        else:
            return found[1].rule
    raise ValueError(
        f"config must be of a model with a router that our kernel has, got a {type(config).__name__}: "
        f"{'; '.join(dict.fromkeys(reasons)) or 'it has no experts'}"
    )


def top_k_of(
    model: nn.Module,
    module: nn.Module,
    understood: dict[str, Understood],
    routings: dict[str, tuple[nn.Module, Routing]],
) -> int:
    """How many experts a token has in the block of `module`.

    Raises:
        ValueError: that is not known.
    """
    name = next(name for name in understood if model.get_submodule(name) is module)
    if name in routings:
        return routings[name][1].top_k
    found = find_top_k(model, module, understood[name].format.dtype)
    if isinstance(found, str):
        raise ValueError(
            f"max_tokens needs to know how many experts a token has, but of {name} it is not: {found}; nothing was changed. "
            "dispatcher='all_gather' and 'all_to_all' go without it"
        )
    return found


def find_top_k(model: nn.Module, experts: nn.Module, dtype: torch.dtype) -> int | str:
    """How many experts the model chooses for a token: seen by running the experts' block; or why that is not known."""
    parents = [(parent, name) for parent in model.modules() for name, one in parent._modules.items() if one is experts]
    try:
        heard = _run(*parents[0], _tokens(_routers(*parents[0]), dtype))
    except NotFusedError as error:
        return str(error)
    if len(heard) != 3 or heard[1].dim() < 2:
        return "the experts of its block are not given ids and weights"
    return heard[1].shape[-1]


def _kind(value: Any) -> tuple[Any, ...]:
    """What two routers, or arguments of their calls, have in common if they compute the same of the same weights."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if not isinstance(value, nn.Module):
        return type(value), repr(value)
    tensors = [(name, *_kind(one)) for name, one in [*value.named_parameters(), *value.named_buffers()]]
    plain = (int, float, str, bool, type(None))
    own = [(name, one if isinstance(one, plain) else id(one)) for name, one in vars(value).items() if name[0] != "_"]
    return type(value), repr(value), *tensors, *own


def _listen(
    block: nn.Module, place: str, dtype: torch.dtype
) -> tuple[nn.Module, tuple[Any, ...], tuple[torch.Tensor, ...], torch.Tensor]:
    """The router, the arguments of its call, what the experts are given, and the tokens for all that."""
    calls: dict[str, tuple[nn.Module, Any, Any, Any]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls[name] = (module, args, kwargs, output)

        return hook

    routers = _routers(block, place)
    for child in routers.values():
        if "forward" in vars(child):
            raise NotFusedError("its router's forward was replaced on the instance")
    handles = [child.register_forward_hook(keep(name), with_kwargs=True) for name, child in routers.items()]
    x = _tokens(routers, dtype)
    try:
        heard = _run(block, place, x)
    finally:
        for handle in handles:
            handle.remove()
    for module, args, kwargs, output in calls.values():
        if isinstance(output, tuple) and len(output) == 3 and len(heard) == 3 and output[2] is heard[1]:
            if kwargs or not args:
                raise NotFusedError("its router is called with keywords")
            return module, args, heard, x
    raise NotFusedError("no module of its block returns (logits, weights, ids) that the experts are given")


def _routers(block: nn.Module, place: str) -> dict[str, nn.Module]:
    """What may be the router of the experts at `place`."""
    routers = {name: child for name, child in block.named_children() if name != place and weight_of(child)}
    if not routers:
        raise NotFusedError("beside the experts there is no module with just one matrix, as a router [E, H]")
    return routers


def _tokens(routers: dict[str, nn.Module], dtype: torch.dtype) -> torch.Tensor:
    """A few random tokens, as these routers take them."""
    weight = next(one for one in next(iter(routers.values())).parameters() if one.dim() == 2)
    random = torch.Generator().manual_seed(1)
    return torch.randn(1, 8, weight.shape[1], generator=random, device="cpu").to(weight.device, dtype)


def _run(block: nn.Module, place: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the experts at `place` are given when `block` is run on `x` in evaluation mode."""
    listener, experts, modes = _Listener(), block._modules[place], [(one, one.training) for one in block.modules()]
    block._modules[place] = listener
    try:
        block.eval()
        with torch.no_grad():
            block.forward(x)
    except Exception as error:  # the model's own code
        raise NotFusedError(f"its block cannot be run on hidden states alone: {error!r}") from error
    finally:
        block._modules[place] = experts
        for module, mode in modes:
            module.training = mode
    return listener.heard


def _check_in_block(
    block: nn.Module, place: str, gate: nn.Module, routing: Routing, heard: tuple[torch.Tensor, ...], x: torch.Tensor
) -> None:
    """Raises NotFusedError unless the experts are given the same when `gate` chooses in our kernel."""
    fuse(gate, routing, "auto")
    try:
        hidden, ids, weights = _run(block, place, x)
    finally:
        unfuse(gate)
    if not torch.equal(hidden, heard[0]):
        raise NotFusedError("its block computes other hidden states from our weights")
    order, wanted = ids.long().argsort(-1), heard[1].argsort(-1)
    same = (ids.gather(-1, order) == heard[1].gather(-1, wanted)).all(-1)
    found, expected = weights.gather(-1, order)[same].float(), heard[2].gather(-1, wanted)[same].float()
    if not torch.allclose(found, expected, rtol=2e-2 if heard[2].dtype != torch.float32 else 1e-4, atol=1e-6):
        raise NotFusedError("its block gives the experts other weights from ours")
