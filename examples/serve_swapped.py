"""A transformers model served by several ranks that share its experts, which move to where the load is.

    torchrun --standalone --nproc-per-node 2 examples/serve_swapped.py            # a tiny random model
    torchrun --standalone --nproc-per-node 8 examples/serve_swapped.py <folder>   # a local checkpoint

No rank ever holds all experts. On CPUs over gloo; with a GPU for every rank over NCCL.
"""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from eplb import EplbConfig, EplbController
from moe_layer.hf import experts_on_meta, load_experts_from, swap_experts

REQUESTS, PROMPT, ANSWER = 8, 12, 8  # prompts of a rank at least; tokens of each, and of its answer at most
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "initializer_range": 0.2,
}


def make_model(folder: str, device: torch.device) -> PreTrainedModel:
    """The model, with a part of each block's experts on each rank."""
    with experts_on_meta():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=AutoConfig.from_pretrained(folder).dtype).to(device)
    swap_experts(model, dist.group.WORLD, num_redundant_experts=dist.get_world_size())
    load_experts_from(model, folder)
    return model.eval()


def serve(model: PreTrainedModel, eplb: EplbController, device: torch.device) -> bool:
    """Each rank its own requests, of other lengths; returns whether a fixed prompt was answered alike throughout."""
    random = torch.Generator().manual_seed(dist.get_rank())
    frequency = torch.arange(1, model.config.vocab_size + 1) ** -1.2  # of words, as in a language
    fixed = torch.arange(3, 3 + PROMPT, device=device)[None]
    answers = []
    while not is_done(len(answers), eplb, device):
        prompt = torch.multinomial(frequency, PROMPT, replacement=True, generator=random)[None].to(device)
        length = int(torch.randint(1, ANSWER, (1,), generator=random))
        # Ranks finish at different lengths, but all call the model equally often: hence synced_gpus.
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "synced_gpus": True}
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, **options)
        answers.append(model.generate(fixed, attention_mask=torch.ones_like(fixed), max_new_tokens=3, **options))
    return all(torch.equal(answer, answers[0]) for answer in answers)


def is_done(num_requests: int, eplb: EplbController, device: torch.device) -> bool:
    """Whether there were enough requests, and experts have moved. All ranks say the same."""
    has_moved = eplb.metrics().moved_experts > 0 or num_requests >= 10 * REQUESTS
    done = torch.tensor(int(num_requests >= REQUESTS and has_moved), device=device)
    dist.all_reduce(done, op=dist.ReduceOp.MIN)
    return bool(done)


def main(folder: str | None = None) -> int:
    device = set_up()
    with tempfile.TemporaryDirectory() as made:
        folders = [folder or made]
        if folder is None and dist.get_rank() == 0:
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(Qwen3MoeConfig(**TINY)).save_pretrained(made)
        dist.broadcast_object_list(folders)  # the others have waited until it is there
        model = make_model(folders[0], device)
        dist.barrier()

    eplb = EplbController(EplbConfig(step_interval=4, window_size=4), process_group=dist.group.WORLD)
    print(f"rank {dist.get_rank()}: {eplb.register(model)} layers registered")
    model.register_forward_hook(lambda *_: eplb.step())  # after each forward
    is_alike = serve(model, eplb, device)
    metrics, error = eplb.metrics(), eplb.health().last_error
    eplb.close()
    print(
        f"rank {dist.get_rank()}: {metrics.flips} flips, {metrics.moved_experts} experts moved; a fixed prompt was answered "
        f"{'alike throughout' if is_alike else 'DIFFERENTLY'}{f'; {error}' if error else ''}",
        flush=True,
    )
    dist.barrier()
    dist.destroy_process_group()
    return int(not is_alike or error is not None or not metrics.moved_experts)


def set_up() -> torch.device:
    """This rank's device, in the group that torchrun asks for."""
    if torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        return device
    torch.set_num_threads(1)  # the ranks share the cores
    dist.init_process_group("gloo")
    return torch.device("cpu")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
