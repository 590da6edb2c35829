"""n-gram drafts: what the lookup finds, and answers that equal those without drafts."""

import itertools

import pytest
import torch

from finback.config import UserError
from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import Request, SamplingParams
from finback.engine.speculate import Drafting, PromptLookup
from finback.model.cache import PAGE
from finback.model.transformer import Transformer
from tests.test_batching import MODELS, finish, naive, sure_model
from tests.toy import V4

NGRAM = EngineConfig(rows=8, tokens=12 * PAGE, chunk=11, reuse=True, speculate=True, draft="ngram")


def drafting(model: Transformer, config: EngineConfig = NGRAM, kinds: str = "draft") -> Engine:
    """An engine that cycles through the given kinds of steps, whatever they cost."""
    engine, turns = Engine(model, (), config), itertools.cycle(kinds.split())
    assert engine.speculation is not None
    engine.speculation.choose = lambda rows: next(turns)  # type: ignore[method-assign]
    return engine


def test_what_followed_the_last_tokens_is_found_again() -> None:
    lookup = PromptLookup()
    assert lookup.drafts([1, 2, 3, 4, 5, 1, 2], 4) == [3, 4, 5, 1], "the last three tokens are new, two are not"
    assert lookup.drafts([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    longer = [1, 2, 3, 4, 5, 1, 2, 3, 9, 2, 3]
    assert lookup.drafts(longer, 1) == [9], "it takes the latest of two matches"
    assert lookup.drafts([*longer, 7], 4) == [], "7 does not occur before"
    assert PromptLookup().drafts([5], 4) == PromptLookup().drafts([5, 5], 4) == []
    assert PromptLookup().drafts([5, 5, 5], 4) == [5]


def toy(vocab: int) -> Transformer:
    """A model whose answers repeat themselves, since few tokens are likely."""
    model = MODELS["mla"]
    with torch.no_grad():
        fewer = Transformer(model.config).initialise(5).eval()
        fewer.head.weight[vocab:] = 0
        fewer.head.weight[:vocab] *= 20
    return fewer


@pytest.mark.parametrize("kinds", ["draft", "probe draft plain draft"])
def test_answers_are_those_without_drafts(kinds: str) -> None:
    """Greedy and sampled, in chunks, with several lengths, preempted, and after a shared prompt."""
    model, prompts = toy(6), [[1, 2, 3, 4, 5, 1, 2, 3][: 4 + i] * (1 + i % 3) for i in range(6)]

    def answers(engine: Engine) -> list[Request]:
        asked = []
        for i, prompt in enumerate(prompts):
            sampling = SamplingParams(0.8 * (i % 2), 30 + 5 * i)
            leader = engine.submit(prompt, sampling, i)
            asked += [leader, engine.submit(prompt, sampling, i + 50, leader=leader)]
        finish(engine)
        assert engine.pages.free == engine.pages.count
        return asked

    plain = answers(Engine(model, (), EngineConfig(8, NGRAM.tokens, 11, reuse=True)))
    found = answers(drafting(model, kinds=kinds))
    assert [r.tokens for r in found] == [r.tokens for r in plain]
    assert any(r.preempted for r in found), "the cache must be too small for all"
    accepted, guesses = (sum(getattr(r, name) for r in found) for name in ("accepted", "drafted"))
    assert 0 < accepted < guesses
    for r, other in zip(found, plain, strict=True):
        assert r.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert len(r.accepted_at) == r.accepted and all(0 < at < len(r.tokens) for at in r.accepted_at)
    assert plain[0].tokens == naive(model, prompts[0], SamplingParams(0.0, 30), 0)[0]


def test_right_drafts_give_five_tokens_a_step() -> None:
    """The answer counts upwards, as the prompt does."""
    engine = drafting(sure_model())
    request = engine.submit([*range(5, 60), 5, 6], SamplingParams(0.0, 41), 0)
    steps = finish(engine)
    assert request.tokens == list(range(7, 48))
    assert request.accepted == request.drafted == 32 and steps <= 15


def test_they_are_measured_and_left_out_where_they_do_not_pay() -> None:
    engine = Engine(toy(6), (), NGRAM)
    assert engine.speculation is not None
    for _ in range(40):
        engine.speculation.saw(1, "draft", seconds=2.0, drafted=1, accepted=0)
        engine.speculation.saw(1, "plain", seconds=1.0, drafted=0, accepted=0)
    assert not engine.speculation.worth(1)
    request = engine.submit([1, 2, 3, 1, 2], SamplingParams(0.0, 20), 0)
    finish(engine)
    assert request.drafted == 0
    for _ in range(40):
        engine.speculation.saw(1, "draft", seconds=2.0, drafted=1, accepted=3)
        engine.speculation.saw(1, "plain", seconds=1.0, drafted=0, accepted=0)
    assert engine.speculation.worth(1)


@pytest.mark.parametrize("draft", ["mtp", "ngram"])
def test_a_compressed_cache_takes_no_ngrams(draft: Drafting) -> None:
    model = Transformer(V4).initialise(0).eval()
    if draft == "ngram":
        with pytest.raises(UserError, match="draft = 'ngram'"):
            Engine(model, (), EngineConfig(tokens=512, speculate=True, draft=draft))
    else:
        Engine(model, (), EngineConfig(tokens=512, speculate=True, draft=draft))
