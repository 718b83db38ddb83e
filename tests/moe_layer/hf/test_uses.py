"""What people do with a model, done with a swapped one: static caches, export, Trainer, LoRA, the package kernels."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from moe_layer.hf import swap_experts
from tests.moe_layer.hf.models import families, make_model, make_tokens, relative


def pair(family: str, device: str, **options):
    """A swapped model and one as it was."""
    model = make_model(family, device=device)
    twin = copy.deepcopy(model)
    swap_experts(model, **options)
    return model, twin


GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}


@pytest.mark.parametrize("family", families(["qwen3_moe", "gpt_oss", "deepseek_v3:groups"]))
def test_generate_with_a_static_cache(family, device):
    model, twin = pair(family, device)
    greedy, tokens = {**GREEDY, "disable_compile": True}, make_tokens(device)
    assert torch.equal(model.generate(tokens, **greedy), twin.generate(tokens, **greedy))


@pytest.mark.gpu
def test_generate_compiles_for_a_static_cache():
    """On a GPU `generate()` compiles the decode of itself, into CUDA graphs."""
    model, twin = pair("qwen3_moe", "cuda")
    tokens = make_tokens("cuda")
    expected = twin.generate(tokens, **GREEDY, disable_compile=True)
    assert torch.equal(model.generate(tokens, **GREEDY), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("family", families(["qwen3_moe", "gpt_oss", "deepseek_v3:groups"]))
def test_a_decode_step_in_a_cuda_graph(family):
    """Captured once, replayed with other tokens: at the same place of a static cache."""
    from transformers import StaticCache

    model, twin = pair(family, "cuda", fuse_routing=True)
    tokens = make_tokens("cuda")
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    steps, now = [], tokens[:, :1].clone()
    place = torch.full((len(tokens), 1), 5, device="cuda")
    mask = (torch.arange(16, device="cuda") <= place)[:, None, None]
    for one in (model, twin):
        cache = StaticCache(config=one.config, max_cache_len=16)
        with torch.no_grad():
            one(tokens[:, :5], use_cache=True, **{name: cache})

        def step(one=one, cache=cache):
            for layer in cache.layers:
                layer.cumulative_length.fill_(5)
            options = {name: cache, "use_cache": True, "position_ids": place, "attention_mask": mask}
            return one(now, **options).logits

        steps.append(step)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                steps[0]()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = steps[0]()
        for column in range(3):
            now.copy_(tokens[:, column : column + 1])
            graph.replay()
            assert relative(found, steps[1]()) <= 1e-5


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


@pytest.mark.parametrize("family", families(["gpt_oss"]))
def test_export_with_any_number_of_tokens(family, device):
    """Without gradients."""
    model, twin = pair(family, device)
    with torch.no_grad():
        length = torch.export.Dim("length", min=2, max=64)
        exported = torch.export.export(_Logits(model), (make_tokens(device),), dynamic_shapes=({1: length},))
        for shape in ((2, 5), (2, 33)):
            tokens = make_tokens(device, shape)
            assert relative(exported.module()(tokens), _Logits(twin)(tokens)) <= 1e-5


@pytest.mark.parametrize("family", families(["gpt_oss"]))
def test_compiled_whole(family, device):
    model, twin = pair(family, device)
    tokens = make_tokens(device)
    with torch.no_grad():
        compiled = torch.compile(_Logits(model), backend="aot_eager", fullgraph=True)
        assert relative(compiled(tokens), _Logits(twin)(tokens)) <= 1e-5


@pytest.mark.parametrize("trainable", [False, True])
def test_a_step_in_bfloat16_with_checkpointing(trainable, device):
    """Autocast as trainers do it. Our experts go on computing in float32, so gradients are near those of float32."""
    model, twin = pair("qwen3_moe", device, trainable=trainable)
    tokens = make_tokens(device)
    twin.train()(tokens, labels=tokens, use_cache=False).loss.backward()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with torch.autocast(device, torch.bfloat16):
        loss = model.train()(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    wanted = {name: one.grad for name, one in twin.named_parameters()}
    for name, one in model.named_parameters():
        assert relative(one.grad, wanted[name]) < 0.1, name
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.step()
    with torch.no_grad():
        assert model(tokens, labels=tokens, use_cache=False).loss < loss


def _trained(model, folder):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in make_tokens(shape=(8, 9))]
    arguments = TrainingArguments(
        str(folder),
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    assert arguments.device.type == next(model.parameters()).device.type
    arguments._n_gpu = 1  # it would copy the model to every GPU
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(folder)
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def test_trainer(device, tmp_path):
    pytest.importorskip("accelerate")
    model, twin = pair("qwen3_moe", device, trainable=True)
    before = {name: one.clone() for name, one in model.state_dict().items() if ".experts." in name}
    found, expected = _trained(model, tmp_path / "ours"), _trained(twin, tmp_path / "theirs")
    assert relative(found, expected) < 2e-2 and found[-1] < found[0]
    for name, one in before.items():
        moved = (twin.state_dict()[name] - one).abs().max()
        assert moved > 0 and (model.state_dict()[name] - twin.state_dict()[name]).abs().mean() < 0.5 * moved, name
    again = type(model).from_pretrained(tmp_path / "ours").to(device)
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("trainable", [False, True])
def test_lora_on_attention(trainable, device, tmp_path):
    peft = pytest.importorskip("peft")
    losses, adapted, tokens = [], [], make_tokens(device)
    for model in pair("qwen3_moe", device, trainable=trainable):
        torch.manual_seed(0)
        adapted.append(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)))
        parameters = [one for one in adapted[-1].parameters() if one.requires_grad]
        assert len(parameters) == 8, "experts are trained too"
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        for _ in range(4):
            losses.append(adapted[-1](tokens, labels=tokens, use_cache=False).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    found, expected = torch.stack(losses).detach().split(4)
    assert relative(found, expected) <= 1e-4 and found[-1] < found[0] - 0.05
    adapted[0].save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model("qwen3_moe", device=device), tmp_path).eval()
    with torch.no_grad():
        ours, theirs, again = [one.eval()(tokens, use_cache=False).logits for one in (*adapted, loaded)]
        merged = adapted[0].merge_and_unload()(tokens, use_cache=False).logits
    assert relative(again, ours) <= 1e-5 and relative(merged, ours) <= 1e-5
    assert relative(ours, theirs) <= 1e-3  # after four steps


_BESIDE = """
import kernels, moe_kernels, torch
from pathlib import Path
assert Path(kernels.__file__).parent.name == "kernels" and hasattr(kernels, "get_kernel"), kernels.__file__
from moe_layer.hf import swap_experts
from tests.moe_layer.hf.models import make_model, make_tokens, relative
model, tokens = make_model("qwen3_moe"), make_tokens()
with torch.no_grad():
    before = model(tokens, use_cache=False).logits
    swap_experts(model)
    assert relative(model(tokens, use_cache=False).logits, before) <= 1e-5
print("both are well")
"""


def test_beside_the_package_kernels(monkeypatch):
    """Hugging Face's; ours lies in a folder of that name, which must not be what `import kernels` finds."""
    found = find_spec("kernels")
    if found is None or found.origin is None:
        pytest.skip("Hugging Face's package kernels is not installed")
    root = Path(__file__).parents[3]
    # `kernels/` of ours is no package, so it is found last: after all that is installed.
    done = subprocess.run(
        [sys.executable, "-c", _BESIDE], cwd=root, capture_output=True, text=True, timeout=120,
        env=_environment(root),
    )  # fmt: skip
    assert done.returncode == 0 and "both are well" in done.stdout, done.stderr


def _environment(root: Path) -> dict[str, str]:
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
