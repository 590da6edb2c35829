"""A request has the same result alone, in a batch, in chunks, from the cache, after preemption and with drafts."""

import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finback.config import UserError
from finback.data.tokenizer import END_THINK, THINK, Tokenizer, train
from finback.engine.detokenizer import Detokenizer
from finback.engine.engine import Engine, EngineConfig
from finback.engine.pages import Pages, digest
from finback.engine.request import Request, SamplingParams, uniforms
from finback.engine.speculate import Speculation
from finback.model.cache import PAGE
from finback.model.config import ModelConfig
from finback.model.transformer import Transformer
from tests.toy import CONFIG, V4, toy_model

DENSE = ModelConfig(
    vocab_size=320,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=80,
    attention="gqa",
    num_key_value_heads=2,
    head_dim=12,
    tie_word_embeddings=True,
    max_position_embeddings=256,
    initializer_range=0.15,
)
SPARSE = dataclasses.replace(CONFIG, index_topk=20, index_n_heads=16, index_head_dim=8, initializer_range=0.15)
MODELS = {"mla": toy_model(), "gqa": Transformer(DENSE).initialise(0).eval()}
MODELS["dsa"] = Transformer(SPARSE).initialise(0).eval()
SHARED = dataclasses.replace(SPARSE, num_hidden_layers=3, shared_indexers=(1, 2))
MODELS["shared dsa"] = Transformer(SHARED).initialise(0).eval()
MODELS["v4"] = (
    Transformer(dataclasses.replace(V4, vocab_size=320, max_position_embeddings=256, num_nextn_predict_layers=1))
    .initialise(0)
    .eval()
)
PROMPT = [1, *range(40, 90)]  # four pages


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = "the quick brown fox jumps over the lazy dog while seven wizards judge vexing matters "
    return train([text * 20], 320, tmp_path_factory.mktemp("words") / "tokenizer.json")


def naive(model: Transformer, prompt: list[int], sampling: SamplingParams, seed: int) -> tuple[list[int], list[float]]:
    """Runs the whole text through the model for every token."""
    tokens, logprobs, numbers = list(prompt), [], uniforms(seed, sampling.max_tokens)
    for i in range(sampling.max_tokens):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([tokens]))[0, -1])
        logp = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
        cumulative = logp.exp().cumsum(-1)
        sampled = int(torch.searchsorted(cumulative, numbers[i] * cumulative[-1], right=True))
        tokens.append(int(logits.argmax()) if sampling.temperature == 0 else sampled)
        logprobs.append(float(logp[tokens[-1]]))
    return tokens[len(prompt) :], logprobs


def finish(engine: Engine) -> int:
    """Steps until the engine is idle; returns the number of steps."""
    for count in itertools.count():
        if not engine.busy:
            return count
        engine.step()
        assert count < 10_000, "the engine makes no progress"
    raise AssertionError


def others(engine: Engine, count: int = 31) -> Iterator[Request]:
    rng = random.Random(1)
    for seed in range(count):
        prompt = [rng.randrange(320) for _ in range(rng.randrange(1, 60))]
        sampling = SamplingParams(
            rng.choice([0.0, 0.5, 1.0]), rng.randrange(1, 50), top_k=rng.choice([0, 5]), top_p=0.9
        )
        yield engine.submit(prompt, sampling, seed)


def alone(model: Transformer) -> Engine:
    return Engine(model, (), EngineConfig(tokens=512))


def in_company(model: Transformer) -> Engine:
    engine = Engine(model, (), EngineConfig(rows=32, tokens=8192))
    list(others(engine))
    return engine


def in_pieces(model: Transformer) -> Engine:
    return Engine(model, (), EngineConfig(tokens=512, chunk=7))


def after_the_same_prompt(model: Transformer) -> Engine:
    engine = Engine(model, (), EngineConfig(tokens=512, reuse=True))
    engine.submit(PROMPT, SamplingParams(0.0, 5), 0)
    finish(engine)
    return engine


def short_of_memory(model: Transformer) -> Engine:
    engine = Engine(model, (), EngineConfig(rows=32, tokens=14 * PAGE, chunk=64))
    for seed in range(3):
        engine.submit([5, 6, 7 + seed], SamplingParams(0.0, 100), seed)
    for _ in range(20):
        engine.step()
    return engine


def drafting(model: Transformer) -> Engine:
    return Engine(model, (), EngineConfig(tokens=512, speculate=True))


def drafting_in_company(model: Transformer) -> Engine:
    engine = Engine(model, (), EngineConfig(rows=32, tokens=8192, chunk=50, reuse=True, speculate=True))
    list(others(engine))
    return engine


WAYS = [alone, in_company, in_pieces, after_the_same_prompt, short_of_memory, drafting, drafting_in_company]


@pytest.mark.parametrize(
    ("way", "kind", "temperature"),
    [
        # V4 is the slowest here
        pytest.param(way, kind, t, marks=[pytest.mark.slow] * (kind == "v4" and (t == 0.0 or way in WAYS[-2:])))
        for way, kind, t in itertools.product(WAYS, MODELS, (0.0, 0.9))
    ],
)
def test_every_way_gives_the_same(way: Callable[[Transformer], Engine], kind: str, temperature: float) -> None:
    model, sampling = MODELS[kind], SamplingParams(temperature, 40)
    tokens, logprobs = naive(model, PROMPT, sampling, 77)
    engine = way(model)
    request = engine.submit(PROMPT, sampling, 77)
    finish(engine)
    assert request.tokens == tokens
    assert np.abs(np.array(request.logprobs) - logprobs).max() <= 1e-4
    assert engine.pages.free == engine.pages.count
    if way is after_the_same_prompt:
        assert request.cached == 48
    if way is short_of_memory:
        assert request.preempted > 0
    if way is drafting and kind == "mla":
        assert request.drafted > 0


def test_the_oldest_is_never_preempted_and_nobody_starves() -> None:
    engine = Engine(MODELS["mla"], (), EngineConfig(rows=8, tokens=16 * PAGE, chunk=32))
    requests = [engine.submit([1, 2, 3 + i], SamplingParams(0.0, 100), i) for i in range(8)]
    finish(engine)
    assert requests[0].preempted == 0 and sum(s.preempted for s in requests) > 0
    assert all(len(s.tokens) == 100 for s in requests)
    ends = [s.last for s in requests]
    assert ends == sorted(ends)


def test_cached_pages_are_shared_only_under_the_same_salt() -> None:
    engine = Engine(MODELS["mla"], (), EngineConfig(tokens=1024, reuse=True))
    seen = []
    for salt in (b"", b"", b"another", b"another"):
        request = engine.submit(PROMPT, SamplingParams(0.0, 4), 0, salt=salt)
        finish(engine)
        seen.append((request.cached, request.tokens))
    assert [cached for cached, _ in seen] == [0, 48, 0, 48]
    assert all(tokens == seen[0][1] for _, tokens in seen)


def test_rows_that_are_more_than_their_pages_begin_where_a_line_is_kept() -> None:
    """V4: a request resumes after a cached prompt or its answer, not after a shared prefix; new weights clear it."""
    engine = Engine(MODELS["v4"], (), EngineConfig(rows=4, tokens=1024, reuse=True))
    first = engine.submit(PROMPT, SamplingParams(0.0, 30), 0)
    finish(engine)
    talk = [*PROMPT, *first.tokens, 7, 8, 9]
    other = [*PROMPT[:40], *range(200, 215)]
    for prompt, cached in ((talk, 80), (other, 0), ([*PROMPT, 5, 6], 48), (talk, 80)):
        sampling = SamplingParams(0.9, 12)
        request = engine.submit(prompt, sampling, 3)
        finish(engine)
        tokens, logprobs = naive(MODELS["v4"], prompt, sampling, 3)
        assert request.cached == cached and request.tokens == tokens
        assert np.abs(np.array(request.logprobs) - logprobs).max() <= 1e-4
    assert len(engine.pages._lines) <= 8  # twice the rows
    engine.pages.forget()
    request = engine.submit(talk, SamplingParams(0.0, 1), 0)
    finish(engine)
    assert request.cached == 0 and engine.pages.free == engine.pages.count


@pytest.mark.parametrize("chunk", [3, 11, 20, 33])
def test_pieces_that_end_off_a_page_leave_a_line_all_the_same(chunk: int) -> None:
    """V4 in pieces of any length, with a prompt that ends just behind a page: answers and reuse are those of whole prompts."""
    for length in (33, 34, 50):
        prompt = [(7 * i + length) % 97 for i in range(length)]
        whole, pieces = (
            Engine(MODELS["v4"], (), EngineConfig(rows=4, tokens=1024, reuse=True, chunk=c)) for c in (8192, chunk)
        )
        for tail in ([], [1, 2, 3], [4]):
            asked = [engine.submit([*prompt, *tail], SamplingParams(0.0, 9), 0) for engine in (whole, pieces)]
            finish(whole)
            finish(pieces)
            expected, found = asked
            assert found.tokens == expected.tokens
            assert np.abs(np.array(found.logprobs) - expected.logprobs).max() <= 1e-4
            assert found.cached == expected.cached == (0 if not tail else (length - 1) // PAGE * PAGE)


@pytest.mark.parametrize("groups", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_v4_drafts_from_its_streams_and_takes_wrong_drafts_back(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With eight tokens many drafts are right and many wrong, at every boundary; answers equal those without drafts.

    Requests run in a batch, in chunks, after a shared prompt, preempted, and in steps that draft, probe or do neither.
    """
    config = dataclasses.replace(V4, vocab_size=8, max_position_embeddings=256, num_nextn_predict_layers=1)
    model = Transformer(config).initialise(3).eval()
    turns = itertools.cycle(["draft"] * 4 + ["plain", "draft", "probe"])
    monkeypatch.setattr(Speculation, "choose", lambda self, rows: next(turns))

    def answers(speculate: bool) -> list[Request]:
        engine = Engine(model, (), EngineConfig(rows=8, tokens=16 * PAGE, chunk=11, reuse=True, speculate=speculate))
        asked, rng = [], random.Random(0)
        for seed in range(groups):
            prompt = [rng.randrange(8) for _ in range(rng.randrange(1, 40))]
            sampling = SamplingParams(1.0 - seed % 2, rng.randrange(20, 70) if groups > 1 else 14)
            leader = engine.submit(prompt, sampling, seed)
            asked += [leader, engine.submit(prompt, sampling, seed + 50, leader=leader)]
        finish(engine)
        assert engine.pages.free == engine.pages.count
        return asked

    plain, drafted = answers(False), answers(True)
    assert [r.tokens for r in drafted] == [r.tokens for r in plain]
    accepted, guesses = (sum(getattr(r, name) for r in drafted) for name in ("accepted", "drafted"))
    assert 0 < accepted < guesses
    assert groups == 1 or any(r.preempted for r in drafted)
    for r, other in zip(drafted, plain, strict=True):
        assert np.abs(np.array(r.logprobs) - other.logprobs).max() <= 1e-4


def test_an_answer_is_found_again_as_the_beginning_of_the_next_prompt() -> None:
    engine = Engine(MODELS["mla"], (), EngineConfig(tokens=1024, reuse=True))
    first = engine.submit(PROMPT, SamplingParams(0.0, 40), 0)
    finish(engine)
    second = engine.submit(PROMPT + first.tokens + [9, 9], SamplingParams(0.0, 4), 0)
    finish(engine)
    assert second.cached == (len(PROMPT) + 39) // PAGE * PAGE  # the last token was never fed to the model


def test_a_follower_waits_and_reads_nothing_twice() -> None:
    engine = Engine(MODELS["mla"], (), EngineConfig(tokens=1024, reuse=True))
    leader = engine.submit(PROMPT, SamplingParams(1.0, 4), 0)
    followers = [engine.submit(PROMPT, SamplingParams(1.0, 4), i, leader=leader) for i in range(1, 4)]
    finish(engine)
    assert leader.cached == 0 and all(f.cached == len(PROMPT) for f in followers)


def prompt_tokens_read(engine: Engine) -> list[int]:
    """Records how many prompt tokens each pass of the engine reads, without padding."""
    read: list[int] = []
    forward = engine.runner._forward

    def counted(rows: list[Request], tokens: Tensor, counts: list[int]) -> Tensor:
        read.append(sum(min(n, len(r.prompt) - r.computed) for r, n in zip(rows, counts, strict=True) if not r.tokens))
        return forward(rows, tokens, counts)

    object.__setattr__(engine.runner, "_forward", counted)
    return read


@pytest.mark.parametrize(
    "kind", [*(kind for kind in MODELS if kind != "v4"), pytest.param("v4", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(),
        EngineConfig(tokens=2048, reuse=True, chunk=16),
        EngineConfig(speculate=True),
        EngineConfig(rows=3),
        EngineConfig(rows=8, tokens=10 * PAGE),
    ],
    ids=["plain", "pages shared, in pieces", "drafting", "few rows", "short of memory"],
)
@pytest.mark.parametrize("size", [1, 16, 51])
def test_a_group_reads_its_prompt_once(size: int, config: EngineConfig, kind: str) -> None:
    """Pages full of prompt tokens are shared, and the page in which answers begin is copied; results do not change."""
    model, sampling, prompt = MODELS[kind], SamplingParams(0.9, 20), PROMPT[:size]
    engine = Engine(model, (), config)
    if engine.speculation is not None:
        engine.speculation.choose = lambda rows: "draft"  # type: ignore[method-assign]
    engine._prepare([size + 20] * 4 + [23])
    read = prompt_tokens_read(engine)
    done = engine.generate([prompt, [9, 9, 9], prompt, prompt, prompt], sampling, [1, 2, 3, 4, 5])
    for completion, seed in zip([done[0], *done[2:]], [1, 3, 4, 5], strict=True):
        tokens, logprobs = naive(model, prompt, sampling, seed)
        assert completion.tokens == tokens
        assert np.abs(np.array(completion.logprobs) - logprobs).max() <= 1e-4
    assert engine.pages.free == engine.pages.count and not engine.scheduler._leaders
    if config.tokens != 10 * PAGE:
        assert sum(read) == size + 3
    if engine.speculation is not None:
        assert sum(r.drafted for r in engine.finished([prompt] * 3, sampling, [1, 2, 3])[1:])


def test_followers_go_on_without_their_leader() -> None:
    engine = Engine(MODELS["mla"], (), EngineConfig(rows=2, tokens=1024, chunk=16))
    sampling, expected = SamplingParams(0.9, 8), naive(MODELS["mla"], PROMPT, SamplingParams(0.9, 8), 2)[0]
    for steps in (1, 5):  # cancelled while it reads its prompt, and after that
        leader = engine.submit(PROMPT, sampling, 1)
        followers = [engine.submit(PROMPT, sampling, seed, leader=leader) for seed in (2, 3, 4)]
        for _ in range(steps):
            engine.step()
        engine.cancel(leader)
        engine.cancel(followers[2])
        finish(engine)
        assert followers[0].tokens == expected and engine.pages.free == engine.pages.count


def test_new_weights_make_old_pages_unfindable() -> None:
    model = toy_model()
    engine = Engine(model, (), EngineConfig(reuse=True))
    before = engine.generate([PROMPT], SamplingParams(0.0, 8), [0])
    assert engine.generate([PROMPT], SamplingParams(0.0, 8), [0])[0].tokens == before[0].tokens
    assert engine.pages.shared > 0
    with torch.no_grad():
        model.blocks[0].attention.kv_up.weight.mul_(-1.5)
    after = engine.generate([PROMPT], SamplingParams(0.0, 8), [0])[0]
    assert after.tokens == naive(model, PROMPT, SamplingParams(0.0, 8), 0)[0]


def test_cancelling_frees_pages_at_once() -> None:
    engine = Engine(MODELS["mla"], (), EngineConfig(rows=2, tokens=1024))
    requests = [engine.submit(PROMPT, SamplingParams(1.0, 100), i) for i in range(4)]
    for _ in range(3):
        engine.step()
    assert (engine.running, len(engine.scheduler.waiting)) == (2, 2)
    for s in requests:
        engine.cancel(s)
    assert engine.pages.free == engine.pages.count and not engine.busy
    assert {s.finish_reason for s in requests} == {"cancelled"} and len(requests[0].tokens) > 0
    engine.cancel(requests[0])  # a second cancellation has no effect


def test_what_can_never_be_served_is_refused() -> None:
    engine = Engine(MODELS["mla"], (), EngineConfig(tokens=64))
    with pytest.raises(UserError, match="exceeds the cache of 64 tokens"):
        engine.submit([1] * 30, SamplingParams(max_tokens=60), 0)
    with pytest.raises(UserError, match=r"prompt = 320: not a token id in 0\.\.319"):
        engine.submit([320], SamplingParams(max_tokens=6), 0)
    with pytest.raises(UserError, match="empty"):
        engine.submit([], SamplingParams(max_tokens=6), 0)
    with pytest.raises(UserError, match="needs text"):
        engine.submit([1], SamplingParams(max_tokens=6, stop=("x",)), 0)
    assert not engine.busy


def test_prompt_logprobs_are_those_of_the_whole_pass() -> None:
    model = MODELS["mla"]
    for chunk in (5, 8192):
        engine = Engine(model, (), EngineConfig(tokens=512, chunk=chunk, reuse=True))
        finish_me = engine.submit(PROMPT, SamplingParams(0.0, 1), 0)
        finish(engine)
        assert finish_me.finish_reason == "length"
        s = engine.submit(PROMPT, SamplingParams(0.0, 0, prompt_logprobs=3), 0)
        finish(engine)
        assert s.tokens == [] and s.finish_reason == "length" and len(s.prompt_logprobs) == len(PROMPT) - 1
        with torch.no_grad():
            logp = model.logits(model(torch.tensor([PROMPT]))[0]).log_softmax(-1)
        for i, line in enumerate(s.prompt_logprobs):
            assert line[0][0] == PROMPT[i + 1] and abs(line[0][1] - float(logp[i, PROMPT[i + 1]])) <= 1e-4
            assert [t for t, _ in line[1:]] == logp[i].topk(3).indices.tolist()


def test_prompt_logprobs_are_made_once_though_preempted() -> None:
    engine = Engine(MODELS["mla"], (), EngineConfig(rows=4, tokens=96, chunk=16))
    first = engine.submit(PROMPT[:30], SamplingParams(0.0, 40, prompt_logprobs=0), 0)
    second = engine.submit(PROMPT[1:31], SamplingParams(0.0, 40, prompt_logprobs=0), 0)
    finish(engine)
    assert second.preempted > 0 and len(first.prompt_logprobs) == len(second.prompt_logprobs) == 29


def test_a_prompt_that_fills_the_cache_is_read_and_blocks_nobody() -> None:
    engine = Engine(MODELS["mla"], (), EngineConfig(rows=2, tokens=64))
    full = engine.submit(list(range(1, 65)), SamplingParams(max_tokens=0, prompt_logprobs=0), 0)
    behind = engine.submit([5, 6, 7], SamplingParams(0.0, 4), 0)
    finish(engine)
    assert full.finish_reason == behind.finish_reason == "length" and len(full.prompt_logprobs) == 63


@pytest.mark.parametrize("knob", [{"temperature": 1e-40}, {"top_p": 1e-46}, {"min_p": 1.0}, {"top_k": 1}])
def test_extreme_knobs_are_greedy(knob: dict[str, float]) -> None:
    engine = Engine(MODELS["gqa"], (), EngineConfig(tokens=512))
    asked = [engine.submit(PROMPT, s, 3) for s in (SamplingParams(0.0, 9), SamplingParams(**{"max_tokens": 9} | knob))]  # type: ignore[arg-type]
    finish(engine)
    assert asked[0].tokens == asked[1].tokens


def test_a_conversation_reads_only_what_is_new(words: Tokenizer) -> None:
    engine = Engine(MODELS["mla"], (), EngineConfig(rows=1, tokens=256, reuse=True), words)
    *_, first = engine.stream(PROMPT, SamplingParams(1.0, 20), 5)
    again = engine.submit(PROMPT, SamplingParams(1.0, 20), 5)
    finish(engine)
    assert again.cached == 48 and again.tokens == first.tokens


def test_alternatives_are_reported_at_temperature_one() -> None:
    engine = Engine(MODELS["mla"], (), EngineConfig(tokens=512))
    s = engine.submit(PROMPT, SamplingParams(0.5, 6, top_logprobs=2), 3)
    finish(engine)
    with torch.no_grad():
        logp = MODELS["mla"].logits(MODELS["mla"](torch.tensor([PROMPT + s.tokens]))[0]).log_softmax(-1)
    for i, line in enumerate(s.top_logprobs):
        at = logp[len(PROMPT) - 1 + i]
        assert line[0][0] == s.tokens[i] and abs(line[0][1] - float(at[s.tokens[i]])) <= 1e-4
        assert [t for t, _ in line[1:]] == at.topk(2).indices.tolist()


@pytest.mark.parametrize("penalty", [1.7, 0.6])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    model = MODELS["gqa"]
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = _greedy_with(model, lambda ids, logits: processor(torch.tensor([ids]), logits[None])[0])
    assert _greedy(model, SamplingParams(0.0, 20, repetition_penalty=penalty)) == expected


def test_frequency_and_presence_penalties_count_the_answer_alone() -> None:
    def penalise(ids: list[int], logits: Tensor) -> Tensor:
        times = torch.bincount(torch.tensor(ids[len(PROMPT) :], dtype=torch.long), minlength=320)
        return logits - 0.4 * times - 0.3 * (times > 0)

    expected = _greedy_with(MODELS["gqa"], penalise)
    assert _greedy(MODELS["gqa"], SamplingParams(0.0, 20, frequency_penalty=0.4, presence_penalty=0.3)) == expected
    assert expected != _greedy(MODELS["gqa"], SamplingParams(0.0, 20))


def test_logit_bias_and_stop_tokens() -> None:
    biased = _greedy(MODELS["gqa"], SamplingParams(0.0, 20, logit_bias=((11, 100.0),)))
    assert biased == [11] * 20
    plain = _greedy(MODELS["gqa"], SamplingParams(0.0, 20))
    stop = plain[3]
    assert _greedy(MODELS["gqa"], SamplingParams(0.0, 20, stop_token_ids=(stop,))) == plain[: plain.index(stop) + 1]


def test_eos_can_be_ignored() -> None:
    plain = _greedy(MODELS["gqa"], SamplingParams(0.0, 20))
    engine = Engine(MODELS["gqa"], [plain[2]], EngineConfig(tokens=512))
    requests = [engine.submit(PROMPT, SamplingParams(0.0, 20, ignore_eos=ignore), 0) for ignore in (False, True)]
    finish(engine)
    assert requests[0].finish_reason == "stop" and len(requests[0].tokens) <= 3
    assert requests[1].tokens == plain


def _greedy(model: Transformer, sampling: SamplingParams) -> list[int]:
    engine = Engine(model, (), EngineConfig(tokens=512))
    request = engine.submit(PROMPT, sampling, 0)
    company = engine.submit(PROMPT, SamplingParams(1.0, 30), 1)  # whose logits must not change
    finish(engine)
    assert company.tokens == naive(model, PROMPT, SamplingParams(1.0, 30), 1)[0]
    return request.tokens


def _greedy_with(model: Transformer, change: Callable[[list[int], Tensor], Tensor]) -> list[int]:
    ids = list(PROMPT)
    for _ in range(20):
        with torch.no_grad():
            ids.append(int(change(ids, model.logits(model(torch.tensor([ids]))[0, -1])).argmax()))
    return ids[len(PROMPT) :]


# ---- drafts --------------------------------------------------------------------------------------------------------


def sure_model() -> Transformer:
    """A model whose MTP module agrees with the trunk: both continue n with n + 1, whatever the context."""
    model = toy_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.copy_(torch.randn(model.embed.shape, generator=torch.Generator().manual_seed(0)))
        model.head.weight.copy_(model.embed.roll(1, 0))
        model.norm.weight.fill_(1.0)
        mtp = model.mtp[0]
        mtp.embed_norm.weight.fill_(1.0)
        mtp.norm.weight.fill_(1.0)
        mtp.project.weight[:, : CONFIG.hidden_size] = torch.eye(CONFIG.hidden_size)
    return model


def test_right_drafts_halve_the_steps() -> None:
    engine = Engine(sure_model(), (), EngineConfig(tokens=512, speculate=True))
    engine.speculation.choose = lambda rows: "draft"  # type: ignore[union-attr, method-assign]
    request = engine.submit([5], SamplingParams(0.0, 41), 0)
    steps = finish(engine)
    assert request.tokens == list(range(6, 47))
    assert request.accepted == request.drafted == 20 and steps <= 22


@pytest.mark.parametrize("kinds", ["draft", "plain", "probe", "draft plain", "plain draft draft", "probe draft"])
def test_switching_drafts_on_and_off_changes_nothing(kinds: str) -> None:
    model = MODELS["mla"]
    engine = Engine(model, (), EngineConfig(tokens=4096, speculate=True, reuse=True))
    turn = itertools.cycle(kinds.split())
    engine.speculation.choose = lambda rows: next(turn)  # type: ignore[union-attr, method-assign]
    requests = [engine.submit(PROMPT[: 10 + i], SamplingParams(0.8, 30), i) for i in range(5)]
    finish(engine)
    for i, s in enumerate(requests):
        assert s.tokens == naive(model, PROMPT[: 10 + i], SamplingParams(0.8, 30), i)[0]


def test_drafted_samples_follow_the_distribution() -> None:
    """Chi-square over the second and third token of 6,000 drafted samples against the exact joint distribution."""
    model = toy_model()
    with torch.no_grad():
        model.head.weight[8:] = 0
        model.head.weight[:8] *= 0.5
    sampling = SamplingParams(1.0, 3, logit_bias=tuple((t, float("-inf")) for t in range(8, 320)))
    engine = Engine(model, (), EngineConfig(rows=256, speculate=True))
    engine.speculation.choose = lambda rows: "draft"  # type: ignore[union-attr, method-assign]
    n = 6000
    results = engine.generate([[3, 4]] * n, sampling, list(range(n)))
    counts = np.zeros((8, 8, 8))
    for r in results:
        counts[tuple(r.tokens)] += 1
    rows = torch.tensor([[3, 4, a, b] for a in range(8) for b in range(8)])
    with torch.no_grad():
        p = model.logits(model(rows))[:, 1:, :8].softmax(-1)
    p = p.view(8, 8, 3, 8)
    joint = p[0, 0, 0][:, None, None] * p[:, 0, 1][:, :, None] * p[:, :, 2]
    expected = n * joint.numpy().reshape(-1)
    kept = expected >= 5
    seen = np.append(counts.reshape(-1)[kept], counts.reshape(-1)[~kept].sum())
    wanted = np.append(expected[kept], expected[~kept].sum())
    chi2, freedom = ((seen - wanted) ** 2 / wanted).sum(), len(seen) - 1
    assert chi2 < freedom + 3.3 * (2 * freedom) ** 0.5  # approximately the 99.9 % point


def test_drafts_are_switched_off_where_they_cost_more_than_they_bring() -> None:
    speculation = Speculation()
    kinds: list[str] = []
    for step in range(2400):
        rows, drafting = ((1, 1.3), (64, 1.9))[step % 2]
        kinds.append(kind := speculation.choose(rows))
        speculation.saw(rows, kind, drafting if kind == "draft" else 1.0, 4 * (kind == "draft"), 3 * (kind == "draft"))
    assert speculation.worth(1) and not speculation.worth(64)
    alone, many = kinds[0::2], kinds[1::2]
    assert alone.count("draft") > 1100 and many.count("plain") > 1100
    assert "probe" in alone[100:] and "draft" in many[100:]  # probed again from time to time
    assert abs(speculation.acceptance - 0.75) < 0.01


# ---- text ----------------------------------------------------------------------------------------------------------


def test_text_is_whole_however_it_comes(words: Tokenizer) -> None:
    said = "the fox — 狐狸 🦊 jumps é"
    text = Detokenizer(words)
    seen = ""
    for token in words.encode(said):
        text.push([token])
        assert said.startswith(text.text) and text.text.startswith(seen) and "\ufffd" not in text.text
        seen = text.text
    text.end()
    assert text.text == said


@given(st.text(alphabet="ab\n狐", max_size=30), st.lists(st.text("ab\n狐", min_size=1, max_size=4), max_size=3))
@settings(max_examples=300)
def test_stop_texts_end_the_answer_where_they_first_appear(said: str, stops: list[str]) -> None:
    text = Detokenizer(_BYTES, stops)
    ids = [i for character in said for i in _BYTES.encode(character)]
    used = next((n for n, i in enumerate(ids, 1) if text.push([i]) is not None), None)
    text.end()
    ends = [place for place in (said.find(s) for s in stops) if place >= 0]
    assert (used is not None) == bool(ends) == (text.stop is not None)
    # the stop string that is complete first ends the answer, even if another one began earlier
    if ends:
        first = min(said.find(s) + len(s) for s in stops if s in said)
        assert (
            text.text
            == said[: min(said.find(s) for s in stops if said.find(s) >= 0 and said.find(s) + len(s) <= first)]
        )
    else:
        assert text.text == said


class _Bytes:
    """A tokenizer of single bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


_BYTES: Tokenizer = _Bytes()  # type: ignore[assignment]


def test_stop_texts_in_the_engine(words: Tokenizer) -> None:
    model = toy_model()
    engine = Engine(model, (), EngineConfig(tokens=512), words)
    free = engine.submit(PROMPT, SamplingParams(1.0, 40), 5)
    finish(engine)
    assert free.detokenizer is not None
    stop = free.detokenizer.text[10:13]
    ended = engine.submit(PROMPT, SamplingParams(1.0, 40, stop=(stop,)), 5)
    finish(engine)
    assert ended.finish_reason == "stop" and ended.detokenizer is not None and ended.detokenizer.stop == stop
    assert ended.detokenizer.text == free.detokenizer.text[: free.detokenizer.text.index(stop)]
    assert ended.tokens == free.tokens[: len(ended.tokens)]


def test_a_chain_is_closed_when_its_budget_is_used_up(words: Tokenizer) -> None:
    model = toy_model()
    engine = Engine(model, [words.eos], EngineConfig(tokens=1024), words)
    close, banned = words.ids[END_THINK], ((words.ids[END_THINK], float("-inf")), (words.eos, float("-inf")))
    asked = {
        "free": engine.submit(PROMPT, SamplingParams(1.0, 40, logit_bias=banned), 5, thinking=True),
        "ten": engine.submit(PROMPT, SamplingParams(1.0, 40, logit_bias=banned, thinking_budget=10), 5, thinking=True),
        "none": engine.submit(PROMPT, SamplingParams(1.0, 40, thinking_budget=0), 5, thinking=True),
        "told": engine.submit(PROMPT, SamplingParams(1.0, 40, logit_bias=banned), 5, thinking=True),
        "not": engine.submit(PROMPT, SamplingParams(1.0, 40, logit_bias=banned, thinking_budget=3), 5),
    }
    for _ in range(6):
        engine.step()
    engine.close_thinking(asked["told"])
    finish(engine)
    assert close not in asked["free"].tokens and asked["free"].thinking_tokens == 40
    assert asked["ten"].tokens.index(close) == 10 and asked["ten"].thinking_tokens == 11
    assert asked["ten"].tokens[:10] == asked["free"].tokens[:10]
    assert asked["none"].tokens[0] == close
    assert asked["told"].tokens.index(close) == 6 and not asked["told"].thinking
    assert close not in asked["not"].tokens and asked["not"].thinking_tokens == 0


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["fox", "<think>"]}, "legs": {"type": "integer", "maximum": 99}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("speculate", [False, True])
def test_answers_follow_a_schema_once_the_chain_is_closed(words: Tokenizer, speculate: bool) -> None:
    pytest.importorskip("llguidance")
    engine = Engine(toy_model(), [words.eos], EngineConfig(tokens=4096, speculate=speculate), words)
    schema = json.dumps(SCHEMA)
    plain = [engine.submit(PROMPT, SamplingParams(1.0, 200, schema=schema, thinking_budget=10), i) for i in range(4)]
    chained = [
        engine.submit(PROMPT, SamplingParams(1.0, 200, schema=schema, thinking_budget=10), i, thinking=True)
        for i in range(4)
    ]
    free = engine.submit(PROMPT, SamplingParams(1.0, 30), 9)
    finish(engine)
    for s in plain + chained:
        assert s.detokenizer is not None and s.finish_reason == "stop"
        said = s.detokenizer.text
        if s in chained or said.startswith(THINK):
            _, _, said = said.partition(END_THINK)
        parsed = json.loads(said)
        assert parsed["name"] in ("fox", "<think>") and parsed["legs"] <= 99 and set(parsed) == {"name", "legs"}
    assert free.tokens == naive(toy_model(), PROMPT, SamplingParams(1.0, 30), 9)[0][: len(free.tokens)]


@pytest.mark.parametrize("schema", ["{", "[1]", '{"type": "nothing"}', '{"$ref": "#/nowhere"}', '{"type": 5}'])
def test_a_schema_that_is_none_is_refused(words: Tokenizer, schema: str) -> None:
    pytest.importorskip("llguidance")
    engine = Engine(toy_model(), [words.eos], EngineConfig(tokens=512), words)
    with pytest.raises(UserError, match="response_format"):
        engine.submit(PROMPT, SamplingParams(1.0, 40, schema=schema), 0)
    assert not engine.busy


# ---- pages ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["take", "release", "publish", "find"]), st.integers(0, 7)), max_size=60))
@settings(max_examples=200)
def test_pages_are_never_lost_and_never_given_twice(actions: list[tuple[str, int]]) -> None:
    pages = Pages(4, PAGE)
    held: list[int] = []
    named: dict[bytes, int] = {}
    for action, n in actions:
        name = digest(b"", [n])
        if action == "take" and pages.free:
            page = pages.take()
            assert page not in held and 1 <= page <= 4
            named = {k: p for k, p in named.items() if p != page}
            held.append(page)
        elif action == "release" and held:
            pages.release([held.pop(n % len(held))])
        elif action == "publish" and held:
            page = held[n % len(held)]
            if name not in named and page not in named.values():
                named[name] = page
            pages.publish(page, name)
        elif action == "find":
            found = pages.find(name)
            assert found == named.get(name)
            held += [found] if found is not None else []
        assert pages.free == 4 - len(set(held))
    pages.release(held)
    pages.forget()
    assert pages.free == 4 and pages.shared == 0


def test_digests_depend_on_all_that_came_before() -> None:
    first, second = digest(b"", [1, 2]), digest(b"", [1, 3])
    assert len({first, second, digest(first, [5]), digest(second, [5]), digest(b"salt", [1, 2])}) == 5


def test_uniforms_are_the_same_however_many_are_asked() -> None:
    request = Request([1], SamplingParams(), seed=12)
    numbers = []
    for _ in range(300):
        numbers.append(request.uniform())
        request.tokens.append(0)
    assert numbers == uniforms(12, 300).tolist()
