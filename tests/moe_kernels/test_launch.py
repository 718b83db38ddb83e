from types import SimpleNamespace

import pytest
import torch
import triton
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels import combine, launch
from moe_kernels.launch import Launcher, PreparedLaunch, has_pdl


@pytest.mark.parametrize(("capability", "expected"), [((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_kernels_overlap_from_hopper_on(monkeypatch, capability, expected):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    has_pdl.cache_clear()
    assert has_pdl(0) is expected
    has_pdl.cache_clear()


def test_nothing_overlaps_on_a_cpu():
    assert not has_pdl(torch.zeros(1).get_device())


@pytest.fixture
def compiled(monkeypatch):
    """A compiled kernel that launches nothing, but notes what it was to launch and calls hooks."""
    monkeypatch.setattr(launch, "_prepares", lambda: True)
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


class Jit:
    """A Triton kernel of the parameters (a, b, n, count, BLOCK, PDL), the number `count` unspecialised."""

    __name__ = "kernel"
    arg_names = ("a", "b", "n", "count", "BLOCK", "PDL")

    def __init__(self, compiled):
        self.params = [SimpleNamespace(do_not_specialize=name == "count") for name in self.arg_names]
        self.compiled, self.compilations = compiled, []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, **constants):
            self.compilations.append((grid, arguments, constants))
            return self.compiled

        return compile_and_launch


def prepared(compiled):
    launch = PreparedLaunch(Jit(compiled), {"PDL": False, "num_warps": 1, "BLOCK": 16})
    launch((2, 3, 1), 7, "a", "b", 5, 6)  # compiles
    return launch


def test_a_prepared_launch_is_the_compiled_kernels(compiled):
    prepared(compiled)((2, 3, 1), 7, "a", "b", 5, 6)
    compiled[2, 3, 1]("a", "b", 5, 6, 16, False, stream=7)
    ours, tritons = compiled.launches
    assert ours == tritons


@pytest.mark.parametrize("in_chain", [True, False])
@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_prepared_launch_calls_hooks(compiled, monkeypatch, name, in_chain):
    launch, seen = prepared(compiled), []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    launch((2, 3, 1), 7, "a", "b", 5, 6)
    if in_chain:
        getattr(triton.knobs.runtime, name).add(hook)
    else:
        monkeypatch.setattr(triton.knobs.runtime, name, hook)
    launch((2, 3, 1), 7, "a", "b", 5, 6)
    before, after = compiled.launches
    assert before == after and seen == ["kernel"]


def test_a_prepared_launch_without_any_chain_of_hooks(compiled, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", None)
    prepared(compiled)((2, 3, 1), 7, "a", "b", 5, 6)
    assert len(compiled.launches) == 1


MEMORY = torch.zeros(1024, dtype=torch.uint8)  # begins at a multiple of 64 bytes


def tensor_at(byte, dtype=torch.float32):
    return MEMORY[byte : byte + 64].view(dtype)


def descriptor(*block):
    return TensorDescriptor(tensor_at(0).view(4, 4), [4, 4], [4, 1], list(block))


A, B = tensor_at(0), tensor_at(64)


@pytest.mark.parametrize(
    ("other", "constants", "compiles"),
    [
        ((tensor_at(128), B, 5, 6), {}, False),
        ((A, B[:3], 5, 6), {}, False),
        ((tensor_at(4), B, 5, 6), {}, True),
        ((tensor_at(0, torch.int32), B, 5, 6), {}, True),
        ((A, None, 5, 6), {}, True),
        ((A, 1.5, 5, 6), {}, True),
        ((A, B, 16, 6), {}, True),
        ((A, B, 1, 6), {}, True),
        ((A, B, 5, 16), {}, False),
        ((A, B, 5, 1), {}, False),
        ((A, B, 5, 2**31), {}, True),
        ((descriptor(4, 4), B, 5, 6), {}, True),
        ((A, B, 5, 6), {"BLOCK": 32}, True),
        ((A, B, 5, 6), {"num_warps": 4}, True),
    ],
)
def test_a_kernel_is_compiled_anew_for_what_triton_specialises_on(compiled, monkeypatch, other, constants, compiles):
    monkeypatch.setattr(launch, "raw_stream", lambda device_index: 7)
    jit = Jit(compiled)
    kernel, constants = Launcher(jit), {"BLOCK": 16, "num_warps": 1} | constants
    kernel[2, 3](A, B, 5, 6, BLOCK=16, num_warps=1)
    assert jit.compilations == [
        ((2, 3, 1), (A, B, 5, 6), {"BLOCK": 16, "num_warps": 1, "PDL": False, "launch_pdl": False})
    ]
    kernel[8,](*other, **constants)
    assert len(jit.compilations) == 1 + compiles
    kernel[9,](*other, **constants)
    kernel[2, 3](A, B, 5, 6, BLOCK=16, num_warps=1)
    assert len(jit.compilations) == 1 + compiles
    grids = [arguments[:3] for arguments in compiled.launches]
    assert grids == [(8, 1, 1)] * (not compiles) + [(9, 1, 1), (2, 3, 1)]
    assert compiled.launches[-1][-6:] == (A, B, 5, 6, 16, False)


def test_descriptors_of_other_boxes_or_numbers_are_other_kernels(compiled, monkeypatch):
    monkeypatch.setattr(launch, "raw_stream", lambda device_index: 7)
    jit = Jit(compiled)
    kernel = Launcher(jit)
    for first in (descriptor(4, 4), descriptor(2, 4), descriptor(4, 4), descriptor(2, 4)):
        kernel[1,](first, B, 5, 6, BLOCK=16)
    assert len(jit.compilations) == 2


def test_what_can_not_be_an_argument_is_refused(compiled):
    with pytest.raises(TypeError, match="kernel: a str can't be an argument, got 'b'"):
        Launcher(Jit(compiled))[1,](A, "b", 5, 6, BLOCK=16)


def test_few_of_very_many_specialisations_are_kept(compiled, monkeypatch):
    monkeypatch.setattr(launch, "raw_stream", lambda device_index: 7)
    monkeypatch.setattr(launch, "_MOST_PREPARED", 3)
    jit = Jit(compiled)
    kernel = Launcher(jit)
    for n in range(10):
        kernel[1,](A, B, n, 6, BLOCK=16)
        assert len(kernel._prepared) <= 3
    assert len(jit.compilations) == 10


@pytest.mark.gpu
def test_addresses_may_be_aligned_now_and_then(device):
    """Two kernels, each for its own tensors, whichever came first."""
    memory = torch.randn(4 * 2 * 24 + 8, device=device).bfloat16()
    lanes = torch.zeros(4, 2, dtype=torch.int32, device=device)
    for begin in (0, 1, 8, 3, 0):
        rows = memory[begin : begin + 4 * 2 * 24].view(8, 24)
        assert torch.equal(combine(rows, lanes), combine(rows, lanes, backend="torch"))


@pytest.mark.multigpu
def test_kernels_run_where_their_arguments_are():
    before = torch.cuda.current_device()
    for index in (0, 1, 0):
        rows = torch.randn(8, 24, device=f"cuda:{index}")
        lanes = torch.zeros(4, 2, dtype=torch.int32, device=rows.device)
        assert torch.equal(combine(rows, lanes), combine(rows, lanes, backend="torch"))
    assert torch.cuda.current_device() == before
