import pytest
import torch
import triton
from triton.compiler import CompiledKernel

from moe_kernels import backend
from moe_kernels.backend import PreparedLaunch, resolve_backend, uses_pdl


@pytest.mark.parametrize(
    ("asked", "device", "expected"),
    [
        ("auto", "cpu", "torch"),
        ("auto", "cuda", "triton"),
        ("auto", torch.device("cuda", 3), "triton"),
        ("torch", "cuda", "torch"),
        ("torch", "cpu", "torch"),
        ("triton", "cuda:1", "triton"),
    ],
)
def test_resolution(asked, device, expected):
    assert resolve_backend(asked, device) == expected


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert resolve_backend("triton", "cpu") == "triton"
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        resolve_backend("triton", "cpu")


@pytest.mark.parametrize(("asked", "device"), [("cuda", "cpu"), ("", "cpu"), ("triton", "meta")])
def test_refused(asked, device):
    with pytest.raises(ValueError, match="backend="):
        resolve_backend(asked, device)


@pytest.mark.parametrize(("capability", "expected"), [((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_kernels_overlap_from_hopper_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    backend._has_pdl.cache_clear()
    assert backend._has_pdl(0) is expected
    backend._has_pdl.cache_clear()


def test_nothing_overlaps_on_a_cpu():
    assert not uses_pdl(torch.zeros(1))


@pytest.fixture
def compiled(monkeypatch):
    """A compiled kernel that launches nothing, but notes what it was to launch and calls hooks."""
    monkeypatch.setattr(backend, "INTERPRETED", False)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        monkeypatch.setattr(triton.knobs.runtime, name, triton.knobs.HookChain())
    compiled = object.__new__(CompiledKernel)
    compiled.launches = []

    def run(x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        compiled.launches.append((x, y, z, stream, function, packed, *arguments))
        for hook in (enter, leave):
            if hook is not None:
                hook(metadata)

    compiled._run = run
    compiled.module, compiled.function, compiled.packed_metadata = "module", "function", (1, 1, 0)
    compiled.name, compiled.src = "kernel", None
    return compiled


def prepared(compiled):
    launch = PreparedLaunch({(2, 3, 1): lambda *_, **__: compiled}, (2, 3, 1), {"num_warps": 1}, BLOCK=16)
    launch(7, "x", "y")  # compiles
    return launch


def test_a_prepared_launch_is_the_compiled_kernels(compiled):
    prepared(compiled)(7, "x", "y")
    compiled[2, 3, 1]("x", "y", 16, stream=7)
    ours, tritons = compiled.launches
    assert ours == tritons


@pytest.mark.parametrize("in_chain", [True, False])
@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_prepared_launch_calls_hooks(compiled, monkeypatch, name, in_chain):
    launch, seen = prepared(compiled), []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    launch(7, "x", "y")
    if in_chain:
        getattr(triton.knobs.runtime, name).add(hook)
    else:
        monkeypatch.setattr(triton.knobs.runtime, name, hook)
    launch(7, "x", "y")
    before, after = compiled.launches
    assert before == after and seen == ["kernel"]


def test_a_prepared_launch_without_any_chain_of_hooks(compiled, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", None)
    prepared(compiled)(7, "x", "y")
    assert len(compiled.launches) == 1
