"""The engine against the plain loop: same tokens, same log-probabilities, whatever else is in the batch."""

import math
from typing import Any

import pytest
import torch
import transformers

from finback.config import UserError
from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import SamplingParams, uniforms
from finback.engine.sampler import SamplingBatch, narrow, sample
from tests.toy import CONFIG, toy_model

EOS = 7


def knobs(sampling: SamplingParams, rows: int, vocab: int) -> SamplingBatch:
    return SamplingBatch.of([sampling] * rows, vocab, torch.device("cpu"))


PROMPTS = [[1, 20, 30], [1, 50, 60, 70, 80, 90], [1, 44], [1, 99, 98, 97, 96]]


def test_greedy_equals_the_naive_loop() -> None:
    model = toy_model()
    engine = Engine(model, [EOS], EngineConfig(rows=3))  # two waves
    results = engine.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=20), [0] * 4)
    for prompt, result in zip(PROMPTS, results, strict=True):
        tokens = list(prompt)
        with torch.no_grad():
            while len(tokens) < len(prompt) + 20 and (len(tokens) == len(prompt) or tokens[-1] != EOS):
                tokens.append(int(model.logits(model(torch.tensor([tokens]))[0, -1]).argmax()))
        assert result.tokens == tokens[len(prompt) :]
        assert result.finish_reason == ("stop" if tokens[-1] == EOS else "length")


def test_logprobs_equal_the_whole_forward_pass() -> None:
    model = toy_model()
    results = Engine(model, [EOS]).generate(PROMPTS, SamplingParams(temperature=0.8, max_tokens=24), [3, 4, 5, 6])
    assert len({len(r.tokens) for r in results}) > 1 or all(r.finish_reason == "length" for r in results)
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids = torch.tensor([prompt + result.tokens])
        with torch.no_grad():
            logp = (model.logits(model(ids)) / 0.8).log_softmax(dim=-1)[0]
        expected = logp[torch.arange(len(prompt) - 1, ids.size(1) - 1), ids[0, len(prompt) :]]
        assert (expected - torch.tensor(result.logprobs)).abs().max() <= 1e-4


def test_a_seed_fixes_a_sequence_whatever_else_is_in_the_batch() -> None:
    engine = Engine(toy_model(), [EOS])
    sampling = SamplingParams(temperature=1.0, max_tokens=24)
    together = engine.generate(PROMPTS, sampling, [10, 11, 12, 13])
    alone = [engine.generate([p], sampling, [s])[0] for p, s in zip(PROMPTS, [10, 11, 12, 13], strict=True)]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    other = engine.generate(PROMPTS, sampling, [20, 21, 22, 23])
    assert [r.tokens for r in together] != [r.tokens for r in other]


def test_rows_that_end_leave_and_the_others_go_on_unchanged() -> None:
    model = toy_model()
    sampling = SamplingParams(temperature=1.0, max_tokens=40)
    free = Engine(model, ()).generate(PROMPTS, sampling, [1, 2, 3, 4])
    eos = free[0].tokens[4]  # a token that some rows generate early
    ended = Engine(model, [eos]).generate(PROMPTS, sampling, [1, 2, 3, 4])
    for a, b in zip(free, ended, strict=True):
        stop = a.tokens.index(eos) + 1 if eos in a.tokens else len(a.tokens)
        assert b.tokens == a.tokens[:stop]
        assert torch.allclose(torch.tensor(b.logprobs), torch.tensor(a.logprobs[:stop]), atol=1e-5)


def test_streaming_equals_generating() -> None:
    engine = Engine(toy_model(), [EOS])
    sampling = SamplingParams(temperature=1.0, max_tokens=24)
    whole = engine.generate([PROMPTS[1]], sampling, [42])[0].tokens
    assert [r.tokens[-1] for r in engine.stream(PROMPTS[1], sampling, 42)] == whole


def test_samples_follow_the_distribution() -> None:
    """Chi-square of 40,000 draws from 8 tokens, one of which is impossible: below the 99.9 % point of 6 degrees."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, float("-inf"), 1.5, -2.0])
    n = 40_000
    uniform = torch.from_numpy(uniforms(1, n))
    tokens, logp = sample(logits.expand(n, -1), knobs(SamplingParams(0.7), n, 8), uniform)
    p = (logits / 0.7).softmax(dim=0)
    counts = torch.bincount(tokens, minlength=8)
    assert counts[5] == 0
    keep = p > 0
    chi2 = ((counts[keep] - n * p[keep]) ** 2 / (n * p[keep])).sum()
    assert chi2 < 22.46
    assert torch.allclose(logp, p.log()[tokens])
    edge, _ = sample(logits[None], knobs(SamplingParams(1.0), 1, 8), torch.tensor([math.nextafter(1.0, 0.0)]))
    assert edge.item() != 5


@pytest.mark.parametrize("temperature", [0.5, 1.3])
@pytest.mark.parametrize(
    ("k", "p", "m"), [(5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (12, 0.7, 0.05), (1, 0.01, 1.0)]
)
def test_narrowing_is_that_of_transformers(k: int, p: float, m: float, temperature: float) -> None:
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 2
    warped = logits / temperature
    for name, value, off in (("TopK", k, 0), ("TopP", p, 1.0), ("MinP", m, 0.0)):
        if value != off:
            warped = getattr(transformers, f"{name}LogitsWarper")(value)(None, warped)
    ours = narrow((logits / temperature).softmax(-1), knobs(SamplingParams(temperature, 8, k, p, m), 50, 40))
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), warped.softmax(-1))
    tokens, logp = sample(
        logits, knobs(SamplingParams(temperature, 8, k, p, m), 50, 40), torch.from_numpy(uniforms(3, 50))
    )
    assert (warped.gather(1, tokens[:, None]) > -torch.inf).all()
    whole = (logits / temperature).log_softmax(-1)
    torch.testing.assert_close(logp, whole.gather(1, tokens[:, None]).squeeze(1))  # of the full distribution


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ({"top_p": 0.0}, "top_p = 0.0: not above 0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"min_p": 2.0}, "min_p = 2.0"),
        ({"temperature": "hot"}, "^temperature = 'hot': expected float, got str"),
    ],
)
def test_impossible_narrowing_is_refused(knob: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParams(**knob)


def test_too_long_a_request_is_refused() -> None:
    with pytest.raises(UserError, match="max_tokens = 300"):
        Engine(toy_model(), [EOS]).generate([[1] * 10], SamplingParams(max_tokens=300), [0])
    assert CONFIG.max_position_embeddings == 256
