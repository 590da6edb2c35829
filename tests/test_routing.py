"""Routing replay: what the engine records, and that training with replay sends every token to the engine's experts."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finback.checkpoint import models
from finback.config import UserError
from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import Completion, Request, SamplingParams
from finback.model.logprobs import token_logprobs
from finback.model.moe import MoE, Router
from finback.model.recompute import use_recompute
from finback.model.routing import trace_routers
from finback.model.transformer import Transformer
from tests.test_grpo import reinforcement, step, with_varied_rewards
from tests.toy import CONFIG, toy_model

RECORDING = EngineConfig(return_routed_experts=True)
SAMPLING = SamplingParams(temperature=1.0, max_tokens=20)
PROMPT = [1, *range(40, 90)]
# the second of the two default layers is the one with experts
DEEP = replace(CONFIG, num_hidden_layers=3, initializer_range=0.15)


def deep_model() -> Transformer:
    """A dense layer and two with experts, and nonzero biases."""
    model = Transformer(DEEP).initialise(3).eval()
    for router in model.routers():
        router.bias += torch.linspace(-0.05, 0.05, DEEP.n_routed_experts)
    return model


def recorded(
    model: Transformer, tracer: Any, tokens: list[int], store: Tensor, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The choices that a tracer stores in one pass, replaying `given`, and the log-probabilities of the tokens."""
    ids = torch.tensor([tokens[:-1]])
    with torch.no_grad(), tracer(model).recording(store, torch.arange(ids.size(1)), given):
        logprobs, _ = token_logprobs(model, model(ids)[0], torch.tensor(tokens[1:]))
    return store, logprobs


def chosen(model: Transformer, tokens: list[int], given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The trunk's own experts in one pass, (tokens, layers, k), and the log-probabilities of the tokens."""
    c = model.config
    store = torch.zeros(len(tokens) - 1, c.num_hidden_layers, c.num_experts_per_tok, dtype=torch.uint8)
    return recorded(model, trace_routers, tokens, store, given)


def routes(completion: Completion) -> Tensor:
    assert completion.routed_experts is not None
    return torch.from_numpy(completion.routed_experts)


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def test_the_engine_records_all_tokens_but_the_last() -> None:
    model = deep_model()
    prompts = [PROMPT, PROMPT[:3], PROMPT[:20]]
    for done, prompt in zip(Engine(model, [7], RECORDING).generate(prompts, SAMPLING, [1, 2, 3]), prompts, strict=True):
        text = prompt + done.tokens
        assert routes(done).shape == (len(text) - 1, 3, DEEP.num_experts_per_tok) and routes(done).dtype == torch.uint8
        assert (routes(done)[:, 0] == 0).all(), "the dense layer has no experts"
        assert torch.equal(routes(done), chosen(model, text)[0])
    assert Engine(model, [7]).generate([PROMPT], SAMPLING, [1])[0].routed_experts is None


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(tokens=512, chunk=16, reuse=True, return_routed_experts=True),
        EngineConfig(tokens=160, rows=6, return_routed_experts=True),
        EngineConfig(tokens=160, rows=6, reuse=True, return_routed_experts=True),
        EngineConfig(speculate=True, return_routed_experts=True),
    ],
    ids=["found in the cache", "preempted", "preempted and found", "drafted"],
)
def test_recorded_however_it_is_run(config: EngineConfig) -> None:
    model = toy_model()
    (alone,) = Engine(toy_model(), [], RECORDING).generate([PROMPT], replace(SAMPLING, max_tokens=40), [5])
    engine = Engine(model, [], config)
    if engine.speculation is not None:
        engine.speculation.choose = lambda rows: "draft"  # type: ignore[method-assign]
    engine._set_up(config.tokens or 512)
    requests: list[Request] = []
    for seed in (5, 6, 7):
        requests.append(engine.submit(PROMPT, replace(SAMPLING, max_tokens=40), seed))
        if config.reuse:
            engine.step()
    finish(engine)
    if config.tokens == 160:
        assert sum(r.preempted for r in requests) > 0
    elif config.reuse:
        assert all(r.cached for r in requests[1:])
    else:
        assert sum(r.accepted for r in requests) and sum(r.drafted - r.accepted for r in requests)
    for request in requests:
        done = request.completion()
        text = PROMPT + done.tokens
        assert routes(done).shape[0] == len(text) - 1
        assert torch.equal(routes(done), chosen(model, text)[0])
    assert requests[0].tokens == alone.tokens and torch.equal(routes(requests[0].completion()), routes(alone))


def test_a_request_that_did_not_read_all_has_no_experts() -> None:
    engine = Engine(toy_model(), [], EngineConfig(tokens=256, return_routed_experts=True))
    request = engine.submit(PROMPT, SAMPLING, 1)
    engine.step()
    engine.cancel(request)
    assert request.completion().routed_experts is None
    with pytest.raises(UserError, match="return_routed_experts = True: the model has no routed experts"):
        Engine(Transformer(replace(CONFIG, n_routed_experts=0)).initialise(0), [], RECORDING)


def test_many_experts_take_two_bytes() -> None:
    config = replace(CONFIG, n_routed_experts=512, n_group=1, topk_group=1, moe_intermediate_size=4)
    model = Transformer(config).initialise(0).eval()
    (done,) = Engine(model, [], RECORDING).generate([PROMPT], SAMPLING, [1])
    assert done.routed_experts is not None and done.routed_experts.dtype == np.uint16
    assert done.routed_experts.max() > 255 and done.routed_experts.max() < 512


def test_what_is_given_is_taken_in_its_order_and_weighed_by_the_live_router() -> None:
    model = toy_model()
    moe = model.blocks[1].feed_forward
    assert isinstance(moe, MoE)
    routing, x = trace_routers(model), torch.randn(2, 3, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    own, _, affinity = moe.router(x.flatten(0, 1))
    given = torch.full((2, 3, 2, CONFIG.num_experts_per_tok), -1, dtype=torch.int16)
    given[0, :, 1] = torch.tensor([3, 0])
    with routing.replaying(given):
        index, weight, _ = moe.router(x.flatten(0, 1))
    assert (index[:3] == torch.tensor([3, 0])).all() and torch.equal(index[3:], own[3:]), "-1: the router chooses"
    picked = affinity[:3][:, [3, 0]]
    expected = picked / picked.sum(1, keepdim=True) * CONFIG.routed_scaling_factor
    torch.testing.assert_close(weight[:3], expected)
    assert weight.requires_grad
    with routing.replaying(given[:1]), pytest.raises(AssertionError, match="experts for"):
        moe.router(x.flatten(0, 1))
    assert torch.equal(moe.router(x.flatten(0, 1))[0], own), "the replay must end with the call"


def test_the_gap_of_two_experts_that_nearly_tie_vanishes() -> None:
    """As once in a run of the road: the scores of two experts differ by 1.5e-7; trainer and engine choose differently.

    The tie is constructed: the bias of one expert is moved until the engine, which reads token by token, and the
    trainer, which reads all at once, choose differently for a token. The router is in the last layer, so that no
    other token changes.
    """
    model = toy_model()
    router = model.routers()[0]
    found = None
    for token in range(40, 320, 7):
        (done,) = Engine(model, [], RECORDING).generate([[1, token]], replace(SAMPLING, max_tokens=48), [token])
        text = [1, token, *done.tokens]
        if (found := tied(model, router, text, token)) is not None:
            break
    assert found is not None, "found no text in which rounding decides"
    done, text = found
    logprobs, engine = chosen(model, text)[1][1:], torch.tensor(done.logprobs)
    assert (logprobs - engine).abs().max() > 1e-3, "another expert must give another probability"
    assert not torch.equal(chosen(model, text)[0], routes(done))
    taken, replayed = chosen(model, text, routes(done).to(torch.int16)[None])
    assert torch.equal(taken, routes(done))
    assert (replayed[1:] - engine).abs().max() <= 1e-5
    router.bias.zero_()


def tied(model: Transformer, router: Router, text: list[int], seed: int) -> tuple[Completion, list[int]] | None:
    """Searches the tokens for a bias at which engine and trainer choose differently in this text."""
    seen: list[Tensor] = []
    select = router.select
    router.select = lambda affinity, _=None: (seen.append(affinity), select(affinity))[1]  # type: ignore[method-assign, func-returns-value]
    with torch.no_grad():
        model(torch.tensor([text[:-1]]))
    del router.select  # type: ignore[method-assign]
    best = seen[0].topk(3, dim=-1)
    for place in range(2, len(text) - 1):
        _, second, third = best.values[place].tolist()
        router.bias.zero_()
        router.bias[best.indices[place, 2]] = second - third
        (done,) = Engine(model, [], RECORDING).generate([text[:2]], replace(SAMPLING, max_tokens=48), [seed])
        again = text[:2] + done.tokens
        native, logprobs = chosen(model, again)
        differ = (native[:, 1].sort(dim=-1).values != routes(done)[:, 1].sort(dim=-1).values).any(dim=-1)
        if differ[1:].any() and (logprobs[1:] - torch.tensor(done.logprobs)).abs().max() > 1e-3:
            return done, again
    return None


@pytest.mark.parametrize("policy", ["none", "block"])
def test_an_update_takes_the_engines_experts(policy: str, tmp_path: Path) -> None:
    """Biases that change between sampling and the update would route tokens differently, also in recomputation."""

    def updated(replay: bool) -> tuple[dict[str, object], Tensor, list[Tensor]]:
        r = with_varied_rewards(
            reinforcement(tmp_path, routing_replay=replay, lr=1e-2, micro_tokens=60, max_grad_norm=1e9)
        )
        if policy == "block":
            use_recompute(r.model, "block")
        sample = r.sampler.sample

        def sampled(number: int) -> object:
            groups = sample(number)
            for router in r.model.routers():
                router.bias += torch.tensor([0.3, -0.3, 0.2, -0.2])
            return groups

        r.sampler.sample = sampled  # type: ignore[method-assign, assignment]
        metrics = step(r)
        return metrics, r.trainer.gradients.flat.clone(), [router.bias.clone() for router in r.model.routers()]

    metrics, gradient, _ = updated(replay=True)
    assert metrics["gap_max"] <= 1e-4  # type: ignore[operator]
    others, native, _ = updated(replay=False)
    assert others["gap_max"] > 1e-2 and not torch.allclose(gradient, native, rtol=1e-2)  # type: ignore[operator]


def test_recomputation_and_microbatches_replay_alike(tmp_path: Path) -> None:
    gradients = []
    for policy, micro in (("none", 4096), ("block", 40)):
        r = with_varied_rewards(reinforcement(tmp_path, routing_replay=True, micro_tokens=micro, max_grad_norm=1e9))
        use_recompute(r.model, policy)  # type: ignore[arg-type]
        metrics = step(r)
        gradients.append(r.trainer.gradients.flat.clone())
        (load,) = metrics["expert_load"]
        assert sum(load) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_a_copy_of_the_model_routes_for_itself() -> None:
    """For example GRPO's reference model."""
    model = toy_model()
    routing = trace_routers(model)
    copied = copy.deepcopy(model)
    tokens = torch.tensor([PROMPT])
    expected = copied(tokens)
    with routing.replaying(torch.zeros(1, len(PROMPT), 2, CONFIG.num_experts_per_tok, dtype=torch.int16)):
        assert torch.equal(copied(tokens), expected)
        assert not torch.equal(model(tokens), expected)
    assert trace_routers(model) is routing


def test_a_dense_model_has_nothing_to_replay(tmp_path: Path) -> None:
    r = reinforcement(tmp_path)
    models.save(tmp_path / "base", Transformer(replace(r.model.config, n_routed_experts=0)).initialise(0))
    with pytest.raises(UserError, match=r"zero\.routing_replay = True: the model has no routed experts"):
        reinforcement(tmp_path, routing_replay=True)
