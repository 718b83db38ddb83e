"""Our experts in a Qwen3-MoE, by one line; then it generates as it did before.

python examples/swap_qwen3.py                       # a tiny random model
python examples/swap_qwen3.py Qwen/Qwen3-30B-A3B    # a real one (61 GB in bfloat16), or a local folder
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from moe_layer.hf import swap_experts

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


def main(name: str | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name is None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**TINY)).eval().to(device)
        prompt = {"input_ids": torch.arange(3, 15, device=device)[None]}
        answer = lambda tokens: " ".join(map(str, tokens[0].tolist()))  # noqa: E731
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(name)
        prompt = tokenizer("A mixture of experts is", return_tensors="pt").to(device)
        answer = lambda tokens: tokenizer.decode(tokens[0])  # noqa: E731

    before = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    swap_experts(model)
    after = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    print(f"before: {answer(before)}\nafter:  {answer(after)}")
    print(f"{'the same' if torch.equal(before, after) else 'different'} tokens")
    # In bfloat16 a token may differ where two are nearly as likely: sums are rounded in another order.
    return int(name is None and not torch.equal(before, after))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
