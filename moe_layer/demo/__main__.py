"""``python -m moe_layer.demo``: a small model reads text on several ranks while its experts move; a table and a picture."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from moe_layer.arguments import check_integer
from moe_layer.demo.launch import launch
from moe_layer.demo.report import draw, figures, table
from moe_layer.demo.serve import Setup

# Small enough for two CPU cores; for a GPU the widths of OLMoE. Few experts a token, so that a common word makes a hot one.
CPU = {
    "num_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_experts": 32,
    "top_k": 4,
    "tokens_per_rank": 64,
}
GPU = {
    "num_layers": 4, "hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "top_k": 2, "tokens_per_rank": 512,
}  # fmt: skip


def main() -> int:
    arguments = _parse()
    setup = _setup(arguments)
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise SystemExit("the demo needs tqdm and matplotlib: pip install 'moe-layer[demo]'") from error
    started_at = time.perf_counter()
    print(f"{setup.ranks} ranks on {setup.device} over {setup.backend}: {setup.steps} steps of Python's documentation")
    recordings = launch(setup, tqdm(total=setup.steps, unit="step", desc="serving", mininterval=0.5))
    name = torch.cuda.get_device_name() if setup.device == "cuda" else "CPU"
    found = figures(setup, recordings, name, time.perf_counter() - started_at)
    print(table(found))
    draw(recordings, arguments.picture)
    print(f"  picture: {arguments.picture}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")
    if found["max_abs_difference"] != 0:
        print("FAILED: an output changed while experts moved", file=sys.stderr)
        return 1
    if not found["moved_experts"] or not found["flips"]:
        print(f"FAILED: nothing moved; rank 0: {found['health']}", file=sys.stderr)
        return 1
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m moe_layer.demo", description=__doc__.partition("``: ")[2])
    parser.add_argument("--ranks", type=int, help="processes; as many as GPUs if there are several, else 4")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--policy", default="adaptive", help="name of a registered policy")
    parser.add_argument("--step-interval", type=int, default=20, help="steps between two rebalances")
    parser.add_argument("--picture", default="demo.png", help="where the picture goes")
    parser.add_argument("--json", help="where every figure goes")
    for name, value in CPU.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, help=f"default {value} on a CPU, {GPU[name]} on a GPU"
        )
    parser.add_argument("--num-redundant-experts", type=int, help="default: 2 a rank")
    return parser.parse_args()


def _setup(arguments: argparse.Namespace) -> Setup:
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this PyTorch sees no CUDA device")
    num_gpus = torch.cuda.device_count() if device == "cuda" else 0
    ranks = arguments.ranks if arguments.ranks is not None else (num_gpus if num_gpus > 1 else 4)
    if ranks < 2:
        raise SystemExit(f"--ranks must be at least 2, got {ranks}: one rank has nothing to balance")
    redundant = arguments.num_redundant_experts if arguments.num_redundant_experts is not None else 2 * ranks
    sizes = dict(GPU if device == "cuda" else CPU)
    sizes |= {name: value for name in sizes if (value := getattr(arguments, name)) is not None}
    try:
        check_integer("--step-interval", arguments.step_interval, 1)
        check_integer("--num-redundant-experts", redundant, 0)
        for name, value in sizes.items():
            check_integer(f"--{name.replace('_', '-')}", value, 1)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if arguments.steps < 2 * arguments.step_interval:
        raise SystemExit(
            f"--steps must be at least twice --step-interval={arguments.step_interval}, got {arguments.steps}"
        )
    return Setup(
        ranks=ranks,
        device=device,
        # NCCL refuses two ranks on one GPU.
        backend="nccl" if num_gpus >= ranks else "gloo",
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        steps=arguments.steps,
        num_redundant_experts=redundant,
        step_interval=arguments.step_interval,
        window_size=arguments.step_interval,
        policy=arguments.policy,
        **sizes,
    )


if __name__ == "__main__":
    sys.exit(main())
