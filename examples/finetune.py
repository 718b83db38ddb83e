"""Trains a small Qwen3-MoE of transformers on Python's own documentation, with our kernels on the model's own parameters.

    pip install 'moe-layer[transformers]'
    python examples/finetune.py
    python examples/finetune.py --steps 200 --hidden-size 256 --layers 4 --experts 32

A twin with the same weights trains beside it on the same batches, with transformers' own experts ("eager"). Each line has the
losses of both and the time that each took: a step is forward, backward, clipping and AdamW. The program ends with 1 if the
losses differ by more than 0.1 %. On a CPU our kernels are their PyTorch references, so the times say something on a GPU
only. For a model of yours, the one line is ``experts_implementation=...`` below.
"""

import argparse
import copy
import sys
import time

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_layer.demo.text import batches, token_stream
from moe_layer.hf import register_experts_implementation
from moe_layer.training import clip_grad_norm

# Of the losses, relative. Gradients are summed in another order, and what little that makes grows from step to step: to 1.5e-7
# in 40 steps on a CPU.
LARGEST_DIFFERENCE = 1e-3


class Trainer:
    """A model, its optimizer, and what its steps took."""

    def __init__(self, model: torch.nn.Module, learning_rate: float) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, tokens: torch.Tensor) -> None:
        start = time.perf_counter()
        # The loss includes the load-balancing one, by the config's output_router_logits.
        loss = self.model(tokens, labels=tokens, use_cache=False).loss
        self.optimizer.zero_grad()
        loss.backward()
        clip_grad_norm(self.model, 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for the device, so the time is the step's
        self.seconds.append(time.perf_counter() - start)


def make_config(options: argparse.Namespace, vocabulary: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        moe_intermediate_size=options.hidden_size // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=options.hidden_size // 4,
        num_experts=options.experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=options.length,
        initializer_range=options.hidden_size**-0.5,  # experts that say something from the first step on
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a small Qwen3-MoE beside its twin on transformers' experts.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stream, vocabulary = token_stream()
    text = batches(stream, options.steps, 1, 0, options.batch * options.length)
    text = text.view(options.steps, options.batch, options.length).to(device)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        make_config(options, vocabulary), experts_implementation=register_experts_implementation()
    )
    assert isinstance(model, Qwen3MoeForCausalLM)
    twin = copy.deepcopy(model)
    twin.set_experts_implementation("eager")
    ours, theirs = (Trainer(one.to(device), options.learning_rate) for one in (model, twin))

    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {len(stream):,} tokens of text")
    print("step   loss   eager   difference     ms   eager")
    for step, tokens in enumerate(text):
        for trainer in (ours, theirs) if step % 2 else (theirs, ours):  # who comes second finds warmer caches
            trainer.step(tokens)
        loss, other = ours.losses[-1], theirs.losses[-1]
        times = f"{ours.seconds[-1] * 1e3:6.1f}  {theirs.seconds[-1] * 1e3:6.1f}"
        print(f"{step:4d} {loss:7.4f} {other:7.4f} {loss - other:+12.2e} {times}", flush=True)

    pairs = list(zip(ours.losses, theirs.losses, strict=True))
    largest = max(abs(one - other) / other for one, other in pairs)
    medians = [sorted(trainer.seconds)[len(text) // 2] * 1e3 for trainer in (ours, theirs)]
    print(f"loss {ours.losses[0]:.3f} → {ours.losses[-1]:.3f}; largest relative difference of the losses {largest:.1e}")
    print(f"median step {medians[0]:.1f} ms, eager {medians[1]:.1f} ms, on {device}")
    return int(largest > LARGEST_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())
