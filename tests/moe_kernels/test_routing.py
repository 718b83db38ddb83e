import pytest
import torch

from moe_kernels import RoutingRule, topk_routing, topk_routing_torch
from moe_kernels.routing.routing import _topk_routing


def logits_of(tokens, experts, device, dtype=torch.float32, seed=0):
    return torch.randn((tokens, experts), generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_example(device, backend):
    """The kernel's docstring: a tie goes to the lowest id."""
    weights, ids = topk_routing(torch.tensor([[1.0, 3.0, 3.0, 2.0]], device=device), 2, RoutingRule(), backend=backend)
    assert ids.tolist() == [[1, 2]]
    torch.testing.assert_close(weights.cpu(), torch.tensor([[0.5, 0.5]]))


SHAPES = [
    (0, 8, 2),  # no tokens
    (1, 1, 1),  # one expert
    (3, 5, 5),  # all experts, not a power of two
    (7, 128, 8),
    (3, 64, 40),  # more than a warp has threads
    (4, 257, 3),  # just above a power of two
]


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SHAPES)
def test_kernel_matches_reference(device, assert_close, tokens, experts, top_k, renormalize, score_function):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        logits = logits_of(tokens, experts, device, dtype)
        rule = RoutingRule(score_function, renormalize, 2.5)
        weights, ids = topk_routing(logits, top_k, rule, backend="triton")
        expected_weights, expected_ids = topk_routing_torch(logits, top_k, rule)
        assert weights.dtype == torch.float32 and ids.dtype == torch.int32
        assert torch.equal(ids, expected_ids)
        assert_close(weights, expected_weights)


RULES = [
    RoutingRule("sqrtsoftplus"),
    RoutingRule("sigmoid", epsilon=1e-6, scale=2.5, round_to="bfloat16"),
    RoutingRule("softmax", epsilon=0.0, round_to="float16"),
    RoutingRule("sigmoid", num_groups=4, top_groups=2),
    RoutingRule("sigmoid", num_groups=12, top_groups=5, renormalize=False),  # of 5 experts, no powers of two
    RoutingRule("softmax", num_groups=6, top_groups=1, group_score="max", scale=16.0),
    RoutingRule("sqrtsoftplus", num_groups=60, top_groups=9, group_score="max"),  # of one expert
    RoutingRule("sigmoid", num_groups=3, top_groups=3),  # all of them
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_rules(device, assert_close, rule, biased):
    """Kernel and reference against a computation in float64 that goes over the tokens one by one."""
    logits = 3 * logits_of(5, 60, device)
    bias = logits_of(1, 60, device, seed=3)[0] if biased else None
    for backend in ("torch", "triton"):
        weights, ids = topk_routing(logits, 4, rule, bias_E=bias, backend=backend)
        for token in range(5):
            x = logits[token].double().cpu()
            scores = {"softmax": x.softmax(-1), "sigmoid": x.sigmoid(), "sqrtsoftplus": (1 + x.exp()).log().sqrt()}[
                rule.score_function
            ].tolist()
            choice = [score + (0.0 if bias is None else float(bias[expert])) for expert, score in enumerate(scores)]
            size = 60 // rule.num_groups

            def score_of(group, choice=choice, size=size):
                best = sorted(choice[group * size : (group + 1) * size], reverse=True)
                return sum(best[:2]) if rule.group_score == "sum_of_best_two" else best[0]

            kept = sorted(range(rule.num_groups), key=score_of, reverse=True)[: rule.top_groups]
            allowed = [expert for expert in range(60) if expert // size in kept]
            expected = sorted(allowed, key=lambda expert: choice[expert], reverse=True)[:4]
            assert ids[token].tolist() == expected, backend
            total = sum(scores[expert] for expert in expected) + rule.epsilon if rule.renormalize else 1.0
            exact = torch.tensor([scores[expert] / total * rule.scale for expert in expected])
            dtype = getattr(torch, rule.round_to)
            assert torch.equal(weights[token], weights[token].to(dtype).float()), "not rounded"
            rtol = 2e-6 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(weights[token].cpu(), exact.to(dtype).float(), rtol=rtol, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_groups_by_hand(device, backend):
    """Groups [0, 1], [2, 3], [4, 5]. The best expert, 0, has the worst neighbour: by two it loses, by one it wins."""
    logits = torch.tensor([[3.0, -9.0, 1.0, 1.0, 2.0, 0.5]], device=device)
    by_two = RoutingRule("sigmoid", num_groups=3, top_groups=1)
    by_one = RoutingRule("sigmoid", num_groups=3, top_groups=1, group_score="max")
    assert topk_routing(logits, 2, by_two, backend=backend)[1].tolist() == [[4, 5]]
    assert topk_routing(logits, 2, by_one, backend=backend)[1].tolist() == [[0, 1]]
    ties = torch.zeros(1, 6, device=device)
    assert topk_routing(ties, 3, RoutingRule("sigmoid", num_groups=3, top_groups=2), backend=backend)[1].tolist() == [
        [0, 1, 2]
    ]
    inf, nan = float("inf"), float("nan")  # what is in no kept group is never chosen, whatever the others are
    special = torch.tensor([[0.0, 0.0, 5.0, -inf, -1.0, nan]], device=device)
    assert topk_routing(special, 2, by_one, backend=backend)[1].tolist() == [[2, 3]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_square_root_of_softplus_is_exact_far_out(device, backend):
    logits = torch.tensor([[-60.0, -20.0, 0.0, 15.0, 80.0]], device=device)
    weights, ids = topk_routing(logits, 5, RoutingRule("sqrtsoftplus", renormalize=False), backend=backend)
    exact = torch.nn.functional.softplus(logits.double()).sqrt().gather(-1, ids.long())
    # A GPU's exponential of -60 is off by up to |x| · 2⁻²⁴ relatively.
    torch.testing.assert_close(weights.double(), exact, rtol=4e-6, atol=0)


@pytest.mark.parametrize("experts", [16, 128, 257])
def test_a_token_has_the_same_bits_among_any(device, experts):
    """Also where a program has several tokens."""
    logits, mask = logits_of(9, experts, device), torch.tensor([True, False] * 4 + [True], device=device)
    weights, ids = topk_routing(logits, 3, RoutingRule(), token_mask_T=mask, backend="triton")
    for first, last in ((0, 1), (1, 9), (2, 4), (3, 8), (8, 9)):
        rows = slice(first, last)
        some = topk_routing(logits[rows].clone(), 3, RoutingRule(), token_mask_T=mask[rows].clone(), backend="triton")
        assert torch.equal(some[0], weights[rows]) and torch.equal(some[1], ids[rows])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bias_chooses_but_does_not_weigh(device, backend):
    logits = torch.tensor([[0.0, 1.0, 2.0]], device=device)
    bias = torch.tensor([10.0, 0.0, 0.0], device=device)
    weights, ids = topk_routing(logits, 2, RoutingRule("sigmoid", renormalize=False), bias_E=bias, backend=backend)
    assert ids.tolist() == [[0, 2]]
    torch.testing.assert_close(weights, torch.sigmoid(logits[:, [0, 2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ties_go_to_the_lowest_id(device, backend, dtype):
    logits = torch.randint(0, 2, (9, 33), generator=torch.Generator().manual_seed(1)).float()
    _, ids = topk_routing(logits.to(device, dtype), 20, RoutingRule(), backend=backend)
    for row, chosen in zip(logits.tolist(), ids.tolist(), strict=True):
        assert chosen == sorted(range(33), key=lambda expert: (-row[expert], expert))[:20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_order_of_special_values(device, backend, dtype):
    """Zeros of either sign are equal, and so are a NaN and -inf; a subnormal is not zero."""
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[-0.0, 0.0, nan, -inf, -1.0, inf, 1e-40, -1e-40, 3e38, -3e38]], device=device, dtype=dtype)
    _, ids = topk_routing(logits, 10, RoutingRule(), backend=backend)
    assert ids.tolist() == [[5, 8, 6, 0, 1, 7, 4, 9, 2, 3]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_masked_tokens_get_no_expert_and_no_gradient(device, backend):
    logits = logits_of(4, 6, device)
    logits[1] = float("nan")  # padding may hold anything
    logits.requires_grad_()
    mask = torch.tensor([True, False, True, False], device=device)
    weights, ids = topk_routing(logits, 2, RoutingRule(), token_mask_T=mask, backend=backend)
    assert (ids[~mask] == -1).all() and (weights[~mask] == 0).all() and (ids[mask] >= 0).all()
    weights.square().sum().backward()
    assert (logits.grad[~mask] == 0).all() and logits.grad[mask].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_nan_is_chosen_last_and_stays_visible(device, backend, dtype):
    logits = torch.tensor([[0.0, float("nan"), 2.0, 1.0], [float("nan")] * 4], device=device, dtype=dtype)
    weights, ids = topk_routing(logits, 3, RoutingRule(), backend=backend)
    assert ids.tolist() == [[2, 3, 0], [0, 1, 2]]
    assert weights.isnan().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bias", [None, 0.0])
def test_a_nan_among_sigmoids_is_its_own(device, backend, bias):
    nan = float("nan")
    logits = torch.tensor([[nan, 0.0, 1.0], [nan, 0.0, nan]], device=device)
    bias_E = None if bias is None else torch.full((3,), bias, device=device)
    options = {"bias_E": bias_E, "backend": backend}
    weights, ids = topk_routing(logits, 2, RoutingRule("sigmoid", renormalize=False), **options)
    assert ids.tolist() == [[2, 1], [1, 0]]
    assert weights.isnan().tolist() == [[False, False], [False, True]] and weights[1, 0] == 0.5
    weights, _ = topk_routing(logits, 2, RoutingRule("sigmoid"), **options)
    assert weights.isnan().tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_vanishing_scores_are_not_nan(device, backend):
    weights, _ = topk_routing(torch.full((1, 4), -200.0, device=device), 2, RoutingRule("sigmoid"), backend=backend)
    assert (weights == 0).all()


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient(device, assert_close, backend, renormalize, score_function):
    logits = logits_of(5, 11, device).requires_grad_()
    weights, ids = topk_routing(logits, 3, RoutingRule(score_function, renormalize, 1.5), backend=backend)
    upstream = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2)).to(device)
    weights.backward(upstream)

    exact = logits.detach().double().requires_grad_()
    softplus = torch.nn.functional.softplus(exact)
    scores = {"softmax": exact.softmax(-1), "sigmoid": exact.sigmoid(), "sqrtsoftplus": softplus.sqrt()}[score_function]
    chosen = scores.gather(-1, ids.long())
    if renormalize:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    (1.5 * chosen * upstream.double()).sum().backward()
    assert_close(logits.grad, exact.grad)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_by_hand(device, backend):
    """The example of the kernel's docstring, in bfloat16."""
    logits = torch.zeros((1, 2), device=device, dtype=torch.bfloat16, requires_grad=True)
    weights, _ = topk_routing(logits, 1, RoutingRule(renormalize=False), backend=backend)
    assert weights.tolist() == [[0.5]]
    weights.sum().backward()
    assert logits.grad.dtype == torch.bfloat16 and logits.grad.tolist() == [[0.25, -0.25]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_of_the_gradient(device, assert_close, backend):
    logits = logits_of(5, 11, device).requires_grad_()
    weights, ids = topk_routing(logits, 3, RoutingRule(), backend=backend)
    (grad,) = torch.autograd.grad(weights.square().sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), logits)
    exact = logits.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(exact.gather(-1, ids.long()).softmax(-1).square().sum(), exact, create_graph=True)
    assert_close(second, torch.autograd.grad(grad.square().sum(), exact)[0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_of_many_experts(device, assert_close, backend):
    """Several tokens a program; more experts than a warp reads at once; the last program has one token."""
    for experts in (128, 160):
        logits = logits_of(5, experts, device).requires_grad_()
        weights, ids = topk_routing(logits, 6, RoutingRule(), backend=backend)
        upstream = torch.randn(weights.shape, generator=torch.Generator().manual_seed(3)).to(device)
        weights.backward(upstream)
        exact = logits.detach().double().requires_grad_()
        (exact.gather(-1, ids.long()).softmax(-1) * upstream.double()).sum().backward()
        assert_close(logits.grad, exact.grad)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(device, backend):
    logits = logits_of(3, 6, device).requires_grad_()
    mask, bias = torch.tensor([True, False, True], device=device), torch.zeros(6, device=device)
    grouped = RoutingRule("sigmoid", num_groups=3, top_groups=2, epsilon=1e-6, round_to="bfloat16")
    for rule, *extra in ((RoutingRule(), None, None), (grouped, bias, mask)):
        flat = _topk_routing.flatten(logits, 2, rule, *extra, backend)
        torch.library.opcheck(_topk_routing.registered, flat)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logits_TE", {"logits_TE": torch.zeros(3)}),
        ("logits_TE", {"logits_TE": torch.zeros((3, 4), dtype=torch.int64)}),
        ("logits_TE", {"logits_TE": torch.zeros((4, 3)).T}),
        ("top_k", {"top_k": 0}),
        ("top_k", {"top_k": 5}),
        ("rule.score_function='relu'", {"rule": RoutingRule("relu")}),
        ("rule.renormalize='false'", {"rule": RoutingRule(renormalize="false")}),
        ("rule.scale=None", {"rule": RoutingRule(scale=None)}),
        ("rule.scale=nan", {"rule": RoutingRule(scale=float("nan"))}),
        ("rule.scale=-inf", {"rule": RoutingRule(scale=-float("inf"))}),
        ("rule.epsilon=-1", {"rule": RoutingRule(epsilon=-1)}),
        ("rule.round_to='int8'", {"rule": RoutingRule(round_to="int8")}),
        ("rule.group_score='mean'", {"rule": RoutingRule(group_score="mean")}),
        ("rule.num_groups=0", {"rule": RoutingRule(num_groups=0)}),
        ("rule.num_groups=3.*divide the 4", {"rule": RoutingRule(num_groups=3)}),
        ("rule.num_groups=4.*needs two experts", {"rule": RoutingRule(num_groups=4)}),
        ("rule.top_groups=3.*at most num_groups=2", {"rule": RoutingRule(num_groups=2, top_groups=3)}),
        ("top_k=3.*at most 2", {"rule": RoutingRule(num_groups=2), "top_k": 3}),
        ("bias_E", {"bias_E": torch.zeros(3)}),
        ("token_mask_T", {"token_mask_T": torch.ones(3)}),
    ],
)
def test_refused(name, change):
    good = {"logits_TE": torch.zeros((3, 4)), "top_k": 2, "rule": RoutingRule()}
    with pytest.raises(ValueError, match=name):
        topk_routing(**(good | change))
