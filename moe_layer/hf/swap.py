"""`swap_experts`: puts our experts in the place of a transformers model's; `unswap_experts`: puts them back.

Legend: E experts, W ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from eplb.groups import check_member
from eplb.planning.placement_file import SavedLayer
from eplb.relocation.pool import SlotPool
from moe_kernels import resolve_backend
from moe_kernels.base.checks import FLOATS, check_kind
from moe_layer.arguments import check_bool, check_choice, check_integer, physical_per_rank
from moe_layer.dispatch import Dispatcher
from moe_layer.hf.absence import check_generate, uncheck_generate
from moe_layer.hf.fuse import find_routings, fuse, top_k_of, unfuse
from moe_layer.hf.inspect import SUPPORTED, NotUnderstoodError, Understood, find_experts, is_fp8, understand
from moe_layer.hf.make import Maker
from moe_layer.hf.padding import Padding
from moe_layer.hf.swapped import Swapped, check_all_came
from moe_layer.router import RouterRule
from moe_layer.weights.quantisation import Quantisation
from moe_layer.weights.saving_guard import allow_saving, refuse_saving
from moe_layer.weights.starting import starting_point

_SHADOW_SLOTS = 4  # of all layers together, where experts may move and the caller does not say


@dataclass(frozen=True)
class SwapReport:
    """What `swap_experts` did.

    Attributes:
        swapped: names of the modules that are ours now, with what they are.
        left: names of the modules that were left alone, with the reason.
        fused: of swapped modules whose router chooses in our kernel, the rule.
        not_fused: of the others, the reason; empty if it was not asked for.
    """

    swapped: dict[str, Understood] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    fused: dict[str, RouterRule] = field(default_factory=dict)
    not_fused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        total = len(self.swapped) + len(self.left)
        lines = [f"swapped {len(self.swapped)} of {total} blocks of experts"]
        kinds = [f"{one.num_experts} experts, {one.format.describe()}" for one in self.swapped.values()]
        lines += [f"  {kinds.count(kind)} of {kind}" for kind in dict.fromkeys(kinds)]
        reasons = list(self.not_fused.values())
        if self.fused or reasons:
            lines.append(f"  routing fused in {len(self.fused)} of them")
        lines += [f"  not fused in {reasons.count(reason)}: {reason}" for reason in dict.fromkeys(reasons)]
        lines += [f"  left alone: {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def swap_experts(
    model: nn.Module,
    process_group: dist.ProcessGroup | None = None,
    *,
    tokens: str = "own",
    quantisation: str | Quantisation | None = None,
    trainable: bool = False,
    num_redundant_experts: int = 0,
    num_shadow_slots: int | None = None,
    pool: str | SlotPool = "shared",
    placements: Sequence[SavedLayer] | None = None,
    strict: bool = True,
    fuse_routing: bool | str = "auto",
    count_padding: bool = False,
    dispatcher: str | Dispatcher = "auto",
    max_tokens: int | None = None,
    backend: str = "auto",
) -> SwapReport:
    """Put our experts in the place of every block's `experts` in a transformers model; print and return what was done.

    The model's routers, shared experts and blocks stay as they are, so router logits, the auxiliary loss and every routing
    rule stay right. `state_dict()` and `save_pretrained()` keep the original names and layout. A module is judged by its
    flags, parameters and by what its activation computes, not by its name. Each block's old weights are freed before the
    next block is touched.

    Args:
        model: on its devices and with its weights. Each rank of `process_group` has all experts, until the swap leaves it
            its part; or none, on the meta device (see `experts_on_meta`): then forwards are refused until
            `load_experts_from` or `load_state_dict` has brought them.
        process_group: the ranks that share the experts; None: all experts are on this rank. Over several ranks every rank
            calls the model equally often (`generate()` with ``synced_gpus=True``): otherwise a RuntimeError says so within the
            deadline of the group or dispatcher.
        tokens: "own": each rank has tokens of its own; "replicated": all ranks hold the same batch, of which each computes
            the experts of a part, and all get equal outputs and gradients.
        quantisation: how the experts' matrices are stored: "fp8_block", "mxfp4", "int4" or a `Quantisation`; None: as in the
            model (transformers' `FP8Experts` stay fp8_block). Weights that are there are rounded, those of a checkpoint must
            be so (see `moe_layer.quantisation_of`). `save_pretrained()` is refused then: see `save_experts_to`.
        trainable: whether the experts stay parameters. Otherwise they live in slots, get no gradients, and may move.
            Gradients flow through them in either case.
        num_redundant_experts: of each block, as of `MoELayer`.
        num_shadow_slots: experts that may be replaced at once on a rank: of all blocks together if they share a pool.
            None: 4 if there are several ranks, else 0, as nothing moves on one.
        pool: "shared": blocks of like experts share one pool and its free slots; "own": each has its own; or one
            made with `moe_layer.make_pool()`.
        placements: where the experts of each swapped block are at first, in the model's order, from `eplb.load_placements()`;
            equal on all ranks. None: in order.
        strict: whether to refuse the model if one block is not understood. Otherwise such blocks are left alone.
        fuse_routing: whether the models' routers choose in our kernel, in evaluation mode: "auto": those whose rule is found
            to be one of ours, by trying it, and that have float32 logits. Among equal scores, which are common in bfloat16,
            the kernel takes the lowest id, while PyTorch's choice is open. True: such routers too, and refuse the model if
            the rule of one is not ours. Their logits are recorded as before.
        count_padding: whether padding goes to experts and counts as load. Otherwise, over several ranks and without
            gradients, tokens go nowhere that the model is told of by a 2-D `attention_mask`: what it says at these positions
            is then something else.
        max_tokens: most tokens of any rank's batch in one forward, equal on all ranks: buffers of a static size are made for
            so many, and "auto" may then take a one-sided dispatcher, as of `MoELayer`. A prompt counts in whole, and over
            ranks every forward costs as much as its bound. None: any number.
        dispatcher, backend: as of `MoELayer`.

    Returns:
        Which blocks were swapped, and which were not and why. (`print(report)` says it in lines; rank 0 does.)

    Raises:
        ValueError: an argument out of range; or, with `strict`, blocks that are not understood, or none at all. The model
            is unchanged then.
    """
    check_kind("model", model, nn.Module)
    check_member(process_group)
    num_ranks, rank = 1, 0
    if process_group is not None:
        num_ranks, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    if num_shadow_slots is None:
        num_shadow_slots = _SHADOW_SLOTS if num_ranks > 1 and not trainable else 0
    num_shadow_slots = check_integer("num_shadow_slots", num_shadow_slots, 0)
    num_redundant_experts = check_integer("num_redundant_experts", num_redundant_experts, 0)
    check_choice("tokens", tokens, ("own", "replicated"))
    for name, flag in (("trainable", trainable), ("strict", strict), ("count_padding", count_padding)):
        check_bool(name, flag)
    if placements is not None:
        check_kind("placements", placements, Sequence)
    if max_tokens is not None:
        max_tokens = check_integer("max_tokens", max_tokens, 1)
    if fuse_routing not in (True, False, "auto"):
        raise ValueError(f"fuse_routing must be True, False or 'auto', got {fuse_routing!r}")
    if not isinstance(pool, SlotPool):
        check_choice("pool", pool, ("shared", "own"), " or a SlotPool")
    for name, is_given in (
        ("num_redundant_experts", num_redundant_experts),
        ("num_shadow_slots", num_shadow_slots),
        ("pool", isinstance(pool, SlotPool)),
        ("placements", placements is not None),
    ):
        if trainable and is_given:
            raise ValueError(f"{name} does not go with trainable=True: such experts do not move")
    wanted = Quantisation.of(quantisation)
    understood, left = _understand_all(model, wanted)
    are_quantised = any(one.format.quantisation is not None for one in understood.values())
    if trainable and are_quantised:
        raise ValueError(
            f"trainable=True does not go with quantised experts (quantisation={quantisation!r}): they do not train"
        )
    if strict and (left or not understood):
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in left.items()) or " it has no experts."
        raise ValueError(
            f"model must consist of blocks of experts that can be swapped; nothing was changed.{reasons}\n"
            f"({SUPPORTED}. strict=False leaves other blocks alone.)"
        )
    for one in understood.values():
        physical_per_rank(one.num_experts, num_redundant_experts, num_ranks)
        resolve_backend(backend, one.device)
    if placements is not None and len(placements) != len(understood):
        raise ValueError(f"placements has {len(placements)} layers: the model has {len(understood)} blocks to swap")
    blocks = {model.get_submodule(name): one for name, one in understood.items()}
    starts = {
        module: starting_point(
            saved,
            one.num_experts,
            num_redundant_experts,
            num_ranks,
            (one.num_experts + num_redundant_experts) // num_ranks + num_shadow_slots,
            process_group,
            f"placements[{index}]",
        )
        for index, ((module, one), saved) in enumerate(zip(blocks.items(), placements or (), strict=False))
    }
    routings, not_fused = find_routings(model, understood, fuse_routing)
    maker = Maker(
        process_group,
        trainable=trainable,
        num_redundant_experts=num_redundant_experts,
        num_shadow_slots=num_shadow_slots,
        pool=pool,
        starts=starts,
        dispatcher=dispatcher,
        max_tokens=max_tokens if max_tokens is None or tokens == "own" else -(-max_tokens // num_ranks),
        top_k=lambda module: top_k_of(model, module, understood, routings),
        backend=backend,
    )
    maker.prepare(blocks)
    fused: dict[str, RouterRule] = {}
    padding = Padding(model) if blocks and num_ranks > 1 and not trainable and not count_padding else None
    for name, (original, one) in zip(understood, blocks.items(), strict=True):
        swapped = maker.make(original, one)
        swapped.tokens, swapped.padding, swapped.max_tokens = tokens, padding, max_tokens
        _replace(model, original, swapped)
        if name in routings:
            gate, routing = routings[name]
            fuse(gate, routing, backend)
            swapped.fused_gate = (gate,)
            fused[name] = routing.rule
    if blocks and num_ranks > 1:
        check_generate(model, check_all_came)
    if are_quantised:
        refuse_saving(model)
    report = SwapReport(understood, left, fused, not_fused)
    if rank == 0:
        print(report)
    return report


def unswap_experts(model: nn.Module) -> int:
    """Put the original modules back, with the weights that the swapped ones have now. Collective over several ranks.

    Returns:
        How many modules were put back.

    Raises:
        ValueError: `model` is no module, or itself what was swapped.
        RuntimeError: a module is registered with a controller: close that first; or it has no weights yet.
        TimeoutError: other ranks did not call it.
    """
    check_kind("model", model, nn.Module)
    if isinstance(model, Swapped):
        raise ValueError("model is a block's experts: must be a module around them, in which they can be replaced")
    swapped = [module for module in model.modules() if isinstance(module, Swapped)]
    for module in swapped:
        module.check_loaded()
        if module.trainable and module.resident.num_ranks > 1:
            raise RuntimeError("unswap_experts() is refused: no rank has all parameters of the trainable experts")
        if getattr(module.resident, "controller", None) is not None and not module.resident.controller.is_over:
            raise RuntimeError(
                "unswap_experts() is refused: the model is registered with an EplbController; close() it first"
            )
        if module.format.quantisation is not None and not is_fp8(module.original):
            raise RuntimeError("unswap_experts() is refused: the experts are quantised, and the model's were floats")
    for module in swapped:
        _give_back(module)
        for gate in module.fused_gate:
            unfuse(gate)
        if module.padding is not None:
            module.padding.remove()
        _replace(model, module, module.original)
    uncheck_generate(model)
    allow_saving(model)
    return len(swapped)


def _understand_all(
    model: nn.Module, quantisation: Quantisation | None
) -> tuple[dict[str, Understood], dict[str, str]]:
    """What each module of experts is, or why it is not understood or cannot be quantised so."""
    understood: dict[str, Understood] = {}
    left: dict[str, str] = {}
    uses: dict[int, int] = {}
    for other in model.modules():
        for parameter in other._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for name, module in find_experts(model).items():
        try:
            if isinstance(module, Swapped):
                raise NotUnderstoodError("it is swapped already")
            if module is model:
                raise NotUnderstoodError("it is the whole model: give a module around it, in which it can be replaced")
            if any(uses[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
                raise NotUnderstoodError("its parameters are also those of another module")
            one = understand(module, _home(model, name, module), _dtype_of(model))
            understood[name] = one if quantisation is None else one.stored_as(quantisation)
        except NotUnderstoodError as error:
            left[name or "model"] = str(error)
    return understood, left


def _home(model: nn.Module, name: str, experts: nn.Module) -> torch.device | None:
    """The device of the rest of the block, where experts on the meta device get their slots."""
    block, own = model.get_submodule(name.rpartition(".")[0]), {id(one) for one in experts.parameters()}
    devices = (one.device for one in [*block.parameters(), *block.buffers()] if id(one) not in own)
    return next((device for device in devices if device.type in ("cpu", "cuda")), None)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Of its hidden states: what its config says, else its first float parameter's."""
    said = getattr(getattr(model, "config", None), "dtype", None)
    there = [said, *(parameter.dtype for parameter in model.parameters())]
    return next((dtype for dtype in there if dtype in FLOATS), torch.bfloat16)


def _places(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every (parent, name) under which `model` holds `module`."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is module:
                yield parent, name


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent, name in list(_places(model, old)):
        parent._modules[name] = new


def _give_back(module: Swapped) -> None:
    """Fill the original's parameters with the experts that `module` has. Collective over several ranks."""
    original = module.original
    if any(parameter is module._parameters.get(name) for name, parameter in original.named_parameters()):
        return  # they were never taken
    tensors = module.state_dict()
    names = {held: ours for ours, held in (module.quantised or {}).items()}
    for name, parameter in original.named_parameters():
        value = tensors[names.get(name, name)].to(module.device)
        if parameter.is_meta:  # it cannot get memory
            original._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        else:
            parameter.data = value
    original.train(module.training)
