"""Losses, optimizers and router bias against plain twins and numbers worked by hand; one rank against two."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from finback.kernels import native
from finback.model import logprobs
from finback.model.config import TINY, V2_LITE, V3
from finback.model.count import forward_flops, parameters, training_flops
from finback.model.moe import balance_loss, max_violation
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.train import rates
from finback.train.loss import cross_entropy
from finback.train.optim import MUON_FORMS, Adam, Gradients, Muon, clip_scale, exact_norm, is_matrix, newton_schulz
from tests.many import one_thread, started
from tests.toy import CONFIG, backward, toy_model


def test_chunked_cross_entropy_equals_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(600, 16, generator=generator), torch.randn(50, 16, generator=generator)
    targets = torch.randint(0, 50, (600,), generator=generator)
    targets[::7] = -100
    results = []
    for function in (cross_entropy, lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction="sum")):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss = function(h, w, targets)
        (3 / 500 * loss).backward()
        results.append((loss, h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_norm_of_many_numbers_is_exact() -> None:
    """torch's norm of 1.4 M numbers is off by 2e-5: clipping would differ from that of ranks that share the sum."""
    numbers = torch.randn(1_400_000, generator=torch.Generator().manual_seed(0))
    expected = numbers.double().norm().item()
    assert exact_norm(numbers) == pytest.approx(expected, rel=1e-6)
    assert exact_norm(numbers[:100]) == pytest.approx(numbers[:100].double().norm().item(), rel=1e-6)


def test_threads_do_not_change_the_gradient_of_the_embedding() -> None:
    """The gradients of frequent tokens are summed in one order, whichever threads do it."""
    model, threads = toy_model(1), torch.get_num_threads()
    tokens = torch.randint(0, 5, (64, 256), generator=torch.Generator().manual_seed(0))
    above = torch.randn(64, 256, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    found = []
    try:
        for count in (1, 2, 2, 2):
            torch.set_num_threads(count)
            model.embed.grad = None
            model.embedded(tokens).backward(above)  # type: ignore[no-untyped-call]
            assert model.embed.grad is not None
            found.append(model.embed.grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_token_logprobs_and_entropy() -> None:
    model = toy_model()
    with torch.no_grad():  # the logits of all other tokens are far lower
        model.head.weight.zero_()[:2, :2] = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
        model.head.weight[2:, 2] = -1000.0
    hidden = torch.eye(2, model.config.hidden_size)
    hidden[:, 2] = 1.0
    logp, entropy = logprobs.token_logprobs(model, hidden, torch.tensor([0, 0]), temperature=2.0)
    assert logp[0].item() == pytest.approx(math.log(0.5))
    p = 1 / (1 + math.exp(-1))  # logits (2, 0) / 2
    assert logp[1].item() == pytest.approx(math.log(p))
    assert entropy[1].item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-6)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_log_probabilities_in_chunks_are_those_at_once(compute: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single pass equals log_softmax of all logits, and is bit-identical without a kernel."""
    model, generator = toy_model().train(), torch.Generator().manual_seed(3)
    model.compute = compute
    hidden = torch.randn(600, model.config.hidden_size, generator=generator).to(compute)
    tokens, weight = torch.randint(0, 320, (600,), generator=generator), torch.randn(600, generator=generator)

    def gradients(function: Any) -> list[torch.Tensor]:
        states = hidden.clone().requires_grad_()
        model.head.weight.grad = None
        logp, entropy = function(states)
        (logp * weight).sum().backward()
        return [logp.detach(), entropy, states.grad, model.head.weight.grad]

    def plain(states: torch.Tensor) -> Any:
        logp = ((states @ model.head.weight.to(compute).T).float() / 0.7).log_softmax(-1)
        return logp.gather(1, tokens[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1).detach()

    expected = gradients(plain)
    with monkeypatch.context() as without:
        without.setattr(native, "library", lambda: None)
        for a, b in zip(gradients(lambda h: logprobs.token_logprobs(model, h, tokens, 0.7)), expected, strict=True):
            assert torch.equal(a, b)
    monkeypatch.setattr(logprobs, "ELEMENTS", 320 * 64)
    held: list[int] = []
    model.head.register_forward_hook(lambda *arguments: held.append(len(arguments[2])))
    found = gradients(lambda h: logprobs.token_logprobs(model, h, tokens, 0.7))
    assert sorted(held) == [24] * 2 + [64] * 18  # forward, then backward
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= (1e-6 if compute == torch.float32 else 1e-2) * b.abs().max()


def test_training_loss_is_next_token_plus_weighted_mtp() -> None:
    """Against the losses computed step by step; MTP is averaged over depths and never sees its own target."""
    model = toy_model().train()
    tokens = torch.randint(0, 320, (3, 18), generator=torch.Generator().manual_seed(1))
    losses = backward(model, tokens, mtp_weight=0.3, balance_alpha=0.01)
    grad = model.embed.grad.clone()
    model.zero_grad()
    hidden = model(tokens[:, :16])
    main = F.cross_entropy(model.logits(hidden).flatten(0, 1), tokens[:, 1:17].flatten())
    further = model.mtp_hidden_states(hidden, tokens[:, :17])[0]
    mtp = F.cross_entropy(model.logits(further).flatten(0, 1), tokens[:, 2:18].flatten())
    (main + 0.3 * mtp + 0.01 * model.balance_loss()).backward()
    torch.testing.assert_close(losses.main, main.detach())
    torch.testing.assert_close(losses.mtp, mtp.detach())
    torch.testing.assert_close(grad, model.embed.grad)


def test_balance_loss_by_hand() -> None:
    """Two tokens, two experts, top-1 (V3 eq. 17-20): f = (2·2/(1·2), 0), P = mean normalised affinity."""
    affinity = torch.tensor([[[0.6, 0.2], [0.9, 0.1]]])
    index = torch.tensor([[[0], [0]]])
    p0 = (0.75 + 0.9) / 2
    assert balance_loss(affinity, index, 1, None).item() == pytest.approx(2 * p0)
    balanced = balance_loss(torch.full((1, 2, 2), 0.5), torch.tensor([[[0], [1]]]), 1, None)
    assert balanced.item() == pytest.approx(1.0)
    padded = balance_loss(
        torch.cat([affinity, torch.tensor([[[0.0, 9.0]]])], dim=1),
        torch.tensor([[[0], [0], [1]]]),
        1,
        torch.tensor([[True, True, False]]),
    )
    assert padded.item() == pytest.approx(2 * p0)


def test_router_bias_moves_by_the_sign_and_stays_centred() -> None:
    router = toy_model().routers()[0]
    router.load = torch.tensor([10.0, 2.0, 4.0, 4.0])  # mean 5: one above, three below
    router.update_bias(0.001)
    expected = torch.tensor([-0.001, 0.001, 0.001, 0.001]) - 0.0005
    torch.testing.assert_close(router.bias, expected)
    assert router.load.sum() == 0
    assert max_violation(torch.tensor([10.0, 2.0, 4.0, 4.0])) == pytest.approx(1.0)


def test_bias_chooses_but_never_weighs_and_padding_is_not_counted() -> None:
    model = toy_model().train()
    router = model.routers()[0]
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    index, _, affinity = router(x)
    router.bias[3] = 10.0
    index2, weight2, affinity2 = router(x)
    assert (index2 == 3).any(dim=1).all() and torch.equal(affinity, affinity2)
    picked = affinity.gather(1, index2)
    torch.testing.assert_close(weight2, picked / picked.sum(dim=1, keepdim=True))
    router.load.zero_()
    router.count(index, torch.tensor([True, True, False, True, False, False]))
    assert router.load.sum() == 3 * index.size(1)
    assert router.bias.requires_grad is False and "bias" in dict(router.named_buffers())


def test_newton_schulz_makes_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(3)
    for shape in ((3, 16, 40), (2, 40, 16)):
        raw = torch.randn(shape, generator=generator)
        for matrices, slack in ((raw, 0.0), (raw.bfloat16(), 0.05)):
            values = torch.linalg.svdvals(newton_schulz(matrices).float())
            assert values.min() > 0.6 - slack and values.max() < 1.25 + slack
    diagonal = newton_schulz(torch.diag(torch.tensor([3.0, 2.0]))[None])[0]
    assert diagonal[0, 1].abs() < 1e-4 and diagonal[0, 0] > 0.6  # directions stay


def test_v4s_muon_brings_singular_values_to_one() -> None:
    """Eight fast steps and two exact ones, for a matrix with singular values from 1 to 1/500; scale 0.18 sqrt(3)."""
    left, right = (torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(s)))[0] for s in (0, 1))
    matrix = left @ torch.diag(torch.tensor([1.0, 0.1, 0.002])) @ right.T
    found = newton_schulz(matrix[None], MUON_FORMS["v4"])[0]
    torch.testing.assert_close(found, left @ right.T, atol=0.02, rtol=0)
    assert (newton_schulz(matrix[None])[0] - left @ right.T).abs().max() > 0.1, "five fast steps leave a larger error"
    p = torch.nn.Parameter(torch.eye(3))
    p.grad = matrix.clone()
    muon = Muon([("w", p)], World(), weight_decay=0.0, form="v4")
    muon.momentum = 0.0
    muon.step(lr=0.1)
    torch.testing.assert_close(p.detach(), torch.eye(3) - 0.1 * 0.18 * math.sqrt(3) * found)


def test_muon_step_by_hand() -> None:
    p = torch.nn.Parameter(torch.eye(4))
    p.grad = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    muon = Muon([("w", p)], World(), weight_decay=0.5)
    muon.momentum = 0.0
    muon.step(lr=0.1)
    orthogonal = newton_schulz(p.grad[None])[0]
    torch.testing.assert_close(p.detach(), torch.eye(4) * 0.95 - 0.1 * 0.2 * 2.0 * orthogonal)


def test_who_goes_to_muon() -> None:
    names = {n for n, p in Transformer(CONFIG).named_parameters() if is_matrix(n, p)}
    assert "blocks.1.feed_forward.gate_up" in names and "mtp.0.project.weight" in names
    assert not {"embed", "head.weight", "blocks.1.feed_forward.router.weight", "norm.weight"} & names


def test_updates_clip_gradients_to_the_global_norm() -> None:
    a, b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))
    gradients = Gradients([a, b])
    (a.sum() * 3 + b.sum() * 4).backward()
    norm = gradients.summed(World())
    assert norm == pytest.approx(math.sqrt(3 * 9 + 4 * 16))
    assert clip_scale(norm, 1.0) == 1 / norm and clip_scale(norm, 99.0) == clip_scale(math.inf, 1.0) == 1
    adam, muon = Adam([("a", a)], (0.9, 0.95), 0.0), Muon([("b", b)], World())
    for optimizer in (adam, muon):
        optimizer.step(0.1, clip_scale(norm, 1.0))
    assert adam.moments["a"][1].tolist() == pytest.approx(3 * [0.1 * 3 / norm])
    assert muon.buffers["b"].flatten().tolist() == pytest.approx(4 * [4 / norm])


def test_schedules() -> None:
    assert rates.warmup(50, 100) == 0.5 and rates.warmup(200, 100) == 1.0
    assert rates.decay(10**9, None, 100, 0.1) == 1.0
    assert rates.decay(50, 100, 100, 0.1) == 1.0, "the factor must not exceed 1 before the decay"
    assert rates.decay(150, 100, 100, 0.1) == pytest.approx(0.55)
    assert rates.decay(500, 100, 100, 0.1) == pytest.approx(0.1)


def test_closed_form_counts() -> None:
    """Spec 2.3 and 2.4: active parameters without the input embedding, FLOPs at T = 4096."""
    assert parameters(V3, mtp=False) == 671_026_419_200 - 58 * 256  # the router bias is not a parameter here
    embedding = V3.vocab_size * V3.hidden_size
    assert parameters(V3, active=True, mtp=False) - embedding + 58 * 256 == 36_625_618_432
    assert parameters(V2_LITE, mtp=False) == 15_706_484_224
    assert training_flops(V3, 2048, mtp=False) / 1e9 == pytest.approx(250.5, abs=0.05)
    assert training_flops(V3, 2048, mtp=True) / 1e9 == pytest.approx(260.6, abs=0.1)
    assert forward_flops(TINY, 64, mtp=False) * 3 == training_flops(TINY, 64, mtp=False)
    built = sum(p.numel() for p in Transformer(TINY).parameters())
    assert parameters(TINY) == built


def _steps(rank: int, size: int, out: str) -> None:
    """A few optimizer steps on this rank's rows, router bias included; rank 0 saves the result."""
    world = World.join(rank, size)
    model = toy_model(5).train()
    named = list(model.named_parameters())
    gradients = Gradients([p for _, p in named])
    muon = Muon([(n, p) for n, p in named if is_matrix(n, p)], world)
    adam = Adam([(n, p) for n, p in named if not is_matrix(n, p)], (0.9, 0.95), 0.0)
    tokens = torch.randint(0, 320, (3, 4, 18), generator=torch.Generator().manual_seed(6))
    for batch in tokens:
        gradients.zero()
        backward(model, batch[rank::size], parts=size)
        scale = clip_scale(gradients.summed(world), 1.0)
        muon.step(1e-2, scale)
        adam.step(1e-2, scale)
        for router in model.routers():
            world.sum_(router.load)
            router.update_bias(0.01)
    if rank == 0:
        torch.save(model.state_dict(), out)
    world.leave()


def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    started(2, _steps, 2, str(tmp_path / "two.pt"))
    with one_thread():
        _steps(0, 1, str(tmp_path / "one.pt"))
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 2e-4, name
