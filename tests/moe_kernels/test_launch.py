from random import Random
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import BaseBackend
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels import combine
from moe_kernels.base import launch
from moe_kernels.base.launch import Launcher, PreparedLaunch, has_pdl


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


PREPARES = launch._prepares


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


def test_a_prepared_launch_of_pairs_is_one_of_clusters(compiled):
    """Of 5 programs the last gets one beside it; Triton's launcher multiplies the grid by the size of the cluster."""
    jit = Jit(compiled)
    jit.arg_names = ("a", "b", "n", "count", "CLUSTERS", "PDL")
    launch = PreparedLaunch(jit, {"PDL": False, "CLUSTERS": 4096})
    for _ in range(2):
        launch((5, 3, 1), 7, "a", "b", 5, 6)
    ((grid, *_),) = jit.compilations
    assert grid == (5, 3, 1) and compiled.launches == [(3, 3, 1, 7, "function", (1, 2, 0), "a", "b", 5, 6, 4096, False)]


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


def descriptor(*block, dtype=torch.float32, padding="zero"):
    return TensorDescriptor(tensor_at(0, dtype)[:16].view(4, 4), [4, 4], [4, 1], list(block), padding)


A, B = tensor_at(0), tensor_at(64)


@pytest.mark.parametrize(
    ("other", "constants", "compiles"),
    [
        ((tensor_at(128), B, 5, 6), {}, False),
        ((A, B[:3], 5, 6), {}, False),
        ((tensor_at(4), B, 5, 6), {}, True),
        ((tensor_at(8), B, 5, 6), {}, True),
        ((tensor_at(0, torch.int32), B, 5, 6), {}, True),
        ((A, None, 5, 6), {}, True),
        ((A, 1.5, 5, 6), {}, True),
        ((A, B, 16, 6), {}, True),
        ((A, B, 1, 6), {}, True),
        ((A, B, 5, 16), {}, False),
        ((A, B, 5, 1), {}, False),
        ((A, B, 5, 2**31), {}, True),
        ((A, B, 5, -(2**31)), {}, False),
        ((A, B, 5, -(2**31) - 1), {}, True),
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
    assert jit.compilations == [((2, 3, 1), (A, B, 5, 6), {"BLOCK": 16, "num_warps": 1, "PDL": False})]
    kernel[8,](*other, **constants)
    assert len(jit.compilations) == 1 + compiles
    kernel[9,](*other, **constants)
    kernel[2, 3](A, B, 5, 6, BLOCK=16, num_warps=1)
    assert len(jit.compilations) == 1 + compiles
    grids = [arguments[:3] for arguments in compiled.launches]
    assert grids == [(8, 1, 1)] * (not compiles) + [(9, 1, 1), (2, 3, 1)]
    assert compiled.launches[-1][-6:] == (A, B, 5, 6, 16, False)


def test_descriptors_of_other_boxes_dtypes_or_paddings_are_other_kernels(compiled, monkeypatch):
    monkeypatch.setattr(launch, "raw_stream", lambda device_index: 7)
    jit = Jit(compiled)
    kernel = Launcher(jit)
    different = [
        descriptor(4, 4),
        descriptor(8, 8),
        descriptor(8, 8, dtype=torch.int32),
        descriptor(8, 8, padding="nan"),
    ]
    for first in 2 * different:
        kernel[1,](first, B, 5, 6, BLOCK=16)
    assert len(jit.compilations) == len(different)


def test_constants_are_known_by_their_names(compiled, monkeypatch):
    monkeypatch.setattr(launch, "raw_stream", lambda device_index: 7)
    jit = Jit(compiled)
    kernel = Launcher(jit)
    kernel[1,](A, B, 5, 6, BLOCK=1, num_warps=2)
    kernel[1,](A, B, 5, 6, num_warps=1, BLOCK=2)
    assert len(jit.compilations) == 2


class OnDevice(torch.Tensor):
    """A tensor that says to be on the GPU 1."""

    def get_device(self):
        return 1


def test_a_kernel_is_launched_on_the_device_of_its_first_argument(compiled, monkeypatch):
    entered = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)

        def __exit__(self, *_):
            entered.append(None)

    monkeypatch.setattr(launch, "raw_stream", lambda device_index: (device_index, tuple(entered)))
    monkeypatch.setattr(launch, "on_device", Device)
    monkeypatch.setattr(launch, "has_pdl", lambda device_index: False)  # the machine may have one GPU, or none
    jit = Jit(compiled)
    kernel, there = Launcher(jit), A.as_subclass(OnDevice)
    for first in (A, there, there, A):
        kernel[1,](first, B, 5, 6, BLOCK=16)
    assert len(jit.compilations) == 2, "a kernel belongs to a device"
    assert entered == [-1, None, 1, None, 1, None, -1, None]
    assert [arguments[3] for arguments in compiled.launches] == [(1, (*entered[:4], 1)), (-1, (*entered[:6], -1))]


def test_a_launch_may_wait_for_the_kernel_before(compiled, monkeypatch):
    monkeypatch.setattr(launch, "has_pdl", lambda device_index: True)
    jit = Jit(compiled)
    kernel = Launcher(jit)
    kernel[1,](A, B, 5, 6, BLOCK=16)
    kernel[1,](A, B, 5, 6, BLOCK=16, PDL=False)
    kernel[1,](A, B, 5, 6, BLOCK=16, PDL=True)
    early = {"BLOCK": 16, "PDL": True, "launch_pdl": True}
    assert [constants for *_, constants in jit.compilations] == [early, {"BLOCK": 16, "PDL": False}, early]


@pytest.mark.parametrize("argument", ["b", True])
def test_what_can_not_be_an_argument_is_refused(compiled, argument):
    with pytest.raises(TypeError, match=f"kernel: a {type(argument).__name__} can't be an argument, got {argument!r}"):
        Launcher(Jit(compiled))[1,](A, argument, 5, 6, BLOCK=16)


@pytest.mark.parametrize(
    ("interpreted", "cuda", "expected"), [(False, "13.0", True), (True, "13.0", False), (False, None, False)]
)
def test_what_is_prepared(monkeypatch, interpreted, cuda, expected):
    monkeypatch.setattr(launch, "INTERPRETED", interpreted)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert launch._prepares() is expected


@pytest.mark.parametrize(
    ("version", "expected"), [("3.6.0", True), ("3.7.1", True), ("3.8.0", False), ("3.60.0", False), ("4.0", False)]
)
def test_which_versions_are_tested(version, expected):
    assert launch._is_tested(version) is expected


def test_this_version_is_tested():
    assert launch._TRITON_IS_TESTED


def test_an_unknown_triton_launches_through_its_public_interface(compiled, monkeypatch, caplog):
    """Its compiled kernels, parameters and launches may be anything: none is touched. One warning for all kernels."""
    monkeypatch.setattr(launch, "_prepares", PREPARES)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(triton, "__version__", "3.9.1")
    monkeypatch.setattr(launch, "_TRITON_IS_TESTED", launch._is_tested("3.9.1"))
    monkeypatch.setattr(launch, "raw_stream", lambda device_index: 7)
    launch._launches_publicly.cache_clear()
    jits = [Jit(object()), Jit(object())]
    for jit in jits:
        del jit.params
        kernel = Launcher(jit)
        kernel[2, 3](A, B, 5, 6, BLOCK=16)
        kernel[4,](A, B, 5, 6, BLOCK=16)
        alone = PreparedLaunch(jit, {"BLOCK": 16})
        alone((1, 1, 1), 7, A, B, 5, 6)
        alone((1, 1, 1), 7, A, B, 5, 6)
        with_pdl = {"BLOCK": 16, "PDL": False}
        assert jit.compilations == [
            ((2, 3, 1), (A, B, 5, 6), with_pdl),
            ((4, 1, 1), (A, B, 5, 6), with_pdl),
            *(2 * [((1, 1, 1), (A, B, 5, 6), {"BLOCK": 16})]),
        ]
    (record,) = caplog.records
    assert "3.9.1" in record.getMessage() and record.levelname == "WARNING"


# `def` in a file of its own lines, as Triton reads its source.
def some_kernel(a, b, c, count, number, scale, BLOCK: triton.language.constexpr):
    pass


def random_argument(random):
    def tensor():
        byte = random.choice([0, 8, 16, 24, 32])
        found = tensor_at(byte, random.choice([torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.bool]))
        return random.choice([found, torch.nn.Parameter(found, requires_grad=False)])

    def box():
        dtype, padding = random.choice([(torch.float32, "zero"), (torch.float32, "nan"), (torch.int32, "zero")])
        return descriptor(random.choice([4, 8]), 8, dtype=dtype, padding=padding)

    def number():
        return random.choice([0, 1, 2, 15, 16, 17, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**62])

    return random.choice([tensor, box, number, lambda: None, lambda: 1.5])()


def test_equal_keys_mean_equal_specialisations_by_triton():
    jit = JITFunction(some_kernel, do_not_specialize=["count"], do_not_specialize_on_alignment=["c"])
    binder = create_function_from_signature(jit.signature, jit.params, BaseBackend)
    kernel, random, seen, met = Launcher(jit), Random(0), {}, 0
    for _ in range(20_000):
        # Only two that vary, so that keys are met again.
        arguments = [A, B, None, 7, 5, 2.5]
        for place in random.sample(range(6), 2):
            arguments[place] = random_argument(random)
        key = tuple(kernel._specialization(arguments))
        specialization = str(binder(*arguments, BLOCK=16)[1])
        met += key in seen
        assert seen.setdefault(key, specialization) == specialization
    assert met > 1000 and len(seen) > 1000


@pytest.mark.gpu
def test_addresses_may_be_aligned_now_and_then(device):
    """Two kernels, each for its own tensors, whichever came first."""
    memory = torch.randn(4 * 2 * 24 + 8, device=device).bfloat16()  # 2 bytes each
    lanes = torch.zeros(4, 2, dtype=torch.int32, device=device)
    for begin in (0, 4, 1, 8, 3, 0):
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
