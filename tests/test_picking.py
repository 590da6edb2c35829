"""Indexer replay: what the engine records, and that training with replay attends to the same entries as the engine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finback.config import UserError
from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import Completion, Request, SamplingParams
from finback.model.cache import Pool
from finback.model.compressed_cache import pool_of
from finback.model.config import CSA, V3_2, V4_FLASH, ModelConfig
from finback.model.count import choice_bytes
from finback.model.dsa import IndexerQueries
from finback.model.picking import trace_indexers
from finback.model.recompute import use_recompute
from finback.model.transformer import Transformer
from finback.rollouts.servers import Servers
from tests.test_grpo import reinforcement, step, with_varied_rewards
from tests.test_routing import recorded
from tests.toy import CONFIG, V4

RECORDING = EngineConfig(return_indexer_topk=True)
SAMPLING = SamplingParams(temperature=1.0, max_tokens=40)
PROMPT = [1, *range(40, 90)]
INDEXED: dict[str, Any] = {"index_topk": 6, "index_n_heads": 16, "index_head_dim": 16, "initializer_range": 0.15}
CONFIGS = {
    "v3.2": replace(CONFIG, **INDEXED),
    "glm": replace(CONFIG, **INDEXED, num_hidden_layers=4, shared_indexers=(1, 3)),
    "v4": replace(
        V4, vocab_size=320, max_position_embeddings=256, initializer_range=0.15, num_nextn_predict_layers=1,
        layer_types=(CSA, CSA, *V4.layer_types[1:]), num_hidden_layers=4,
    ),
}  # fmt: skip


def a_model(config: ModelConfig) -> Transformer:
    return Transformer(config).initialise(3).eval()


def chosen(model: Transformer, tokens: list[int], given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The entries that one pass selects, (tokens, indexers, k), and the log-probabilities of the tokens."""
    store = torch.full((len(tokens) - 1, model.config.indexers, model.config.index_topk), -1, dtype=torch.int16)
    return recorded(model, trace_indexers, tokens, store, given)


def entries(completion: Completion) -> Tensor:
    assert completion.indexer_topk is not None
    return torch.from_numpy(completion.indexer_topk)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_engine_records_all_tokens_but_the_last(name: str) -> None:
    model = a_model(CONFIGS[name])
    prompts, indexers = [PROMPT, PROMPT[:3], PROMPT[:20]], 2
    for done, prompt in zip(Engine(model, [7], RECORDING).generate(prompts, SAMPLING, [1, 2, 3]), prompts, strict=True):
        text, found = prompt + done.tokens, entries(done)
        assert found.shape == (len(text) - 1, indexers, model.config.index_topk) and found.dtype == torch.int16
        assert torch.equal(found, chosen(model, text)[0])
        rate = model.config.compress_rate_csa if name == "v4" else 1
        visible = (torch.arange(len(text) - 1) + 1) // rate
        picks = visible > model.config.index_topk
        assert (found[~picks] == -1).all() and (found[picks] >= 0).all(), "-1 where all visible entries are selected"
        assert (found < visible[:, None, None]).all() and (found[picks].diff(dim=-1) > 0).all()
    assert Engine(model, [7]).generate([PROMPT], SAMPLING, [1])[0].indexer_topk is None


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(tokens=512, chunk=16, reuse=True, return_indexer_topk=True),
        EngineConfig(tokens=160, rows=6, reuse=True, return_indexer_topk=True),
        EngineConfig(speculate=True, return_indexer_topk=True),
    ],
    ids=["found in the cache", "preempted and found", "drafted"],
)
def test_recorded_however_it_is_run(config: EngineConfig, name: str) -> None:
    model = a_model(CONFIGS[name])
    engine = Engine(model, [], config)
    if engine.speculation is not None:
        engine.speculation.choose = lambda rows: "draft"  # type: ignore[method-assign]
    engine._set_up(config.tokens or 512)
    requests: list[Request] = []
    for seed in (5, 6, 7):
        requests.append(engine.submit(PROMPT, SAMPLING, seed))
        if config.reuse:
            engine.step()
    while engine.busy:
        engine.step()
    if config.tokens == 160:
        assert sum(r.preempted for r in requests) > 0
    elif not config.reuse:
        assert sum(r.drafted for r in requests)
    for request in requests:
        done = request.completion()
        text = PROMPT + done.tokens
        assert entries(done).shape[0] == len(text) - 1
        assert torch.equal(entries(done), chosen(model, text)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_where_everything_is_selected_nothing_changes(name: str) -> None:
    model = a_model(replace(CONFIGS[name], index_topk=96))
    (done,) = Engine(model, [], RECORDING).generate([PROMPT], SAMPLING, [1])
    text = PROMPT + done.tokens
    assert (entries(done) == -1).all()
    assert torch.equal(chosen(model, text)[1], chosen(model, text, entries(done)[None])[1])


def tied(model: Transformer) -> Transformer:
    """Makes the first layer's indexer score equal tokens equally, up to rounding, by zeroing its rotated part."""
    indexer = next(m for m in model.modules() if isinstance(m, IndexerQueries))
    with torch.no_grad():
        indexer.key_norm.weight[: model.config.qk_rope_head_dim] = 0
    return model


def test_the_gap_of_two_scores_that_tie_within_rounding_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of few distinct tokens, whose keys are equal but for the last bits. Scores of tokens at even positions are
    raised by a millionth, which makes the engine's rounding deterministic."""
    config = replace(CONFIGS["v3.2"], vocab_size=12, num_hidden_layers=1, n_routed_experts=0, index_topk=4)
    model = tied(a_model(replace(config, initializer_range=0.5)))
    plain = IndexerQueries.scores

    def rounded(query: Tensor, weight: Tensor, key: Tensor) -> Tensor:
        scores = plain(query, weight, key)
        return scores + scores.abs() * 1e-6 * (torch.arange(scores.size(-1)) % 2 == 0)

    monkeypatch.setattr(IndexerQueries, "scores", staticmethod(rounded))
    (done,) = Engine(model, [], RECORDING).generate([[1, 5, 3, 5, 1]], replace(SAMPLING, max_tokens=96), [0])
    monkeypatch.setattr(IndexerQueries, "scores", staticmethod(plain))
    text, engine = [1, 5, 3, 5, 1, *done.tokens], torch.tensor(done.logprobs)
    native, logprobs = chosen(model, text)
    assert not torch.equal(native, entries(done))
    assert (logprobs[4:] - engine).abs().max() > 1e-1, "other entries must give other probabilities"
    taken, replayed = chosen(model, text, entries(done)[None])
    assert torch.equal(taken, entries(done))
    assert (replayed[4:] - engine).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("v3.2", {}),
        ("v3.2", {"recompute": "block", "micro_tokens": 90}),
        ("v3.2", {"share_prompts": True}),
        ("glm", {"recompute": "block", "micro_tokens": 90}),
        ("v4", {}),
        ("v4", {"recompute": "block", "micro_tokens": 90}),
    ],
    ids=str,
)
def test_an_update_takes_the_engines_entries(name: str, knobs: dict[str, Any], tmp_path: Path) -> None:
    """An indexer that changes between sampling and the update would select other entries, also in recomputation."""

    def gap(replay: bool) -> float:
        more = {"num_generations": 4, "max_tokens": 24, "lr": 1e-2, "max_grad_norm": 1e9, **knobs}
        policy = more.pop("recompute", "none")
        r = with_varied_rewards(reinforcement(tmp_path, a_model(CONFIGS[name]), indexer_replay=replay, **more))
        use_recompute(r.model, policy)  # type: ignore[arg-type]
        sample = r.sampler.sample

        def sampled(number: int) -> object:
            groups = sample(number)
            with torch.no_grad():
                for module in r.model.modules():
                    if isinstance(module, IndexerQueries):
                        module.weight.weight.neg_()
            return groups

        r.sampler.sample = sampled  # type: ignore[method-assign, assignment]
        metrics = step(r)
        assert metrics["tokens_with_gradient"] > 0
        return float(metrics["gap_max"])

    assert gap(replay=True) <= 1e-4
    assert gap(replay=False) > 1e-2


def test_micro_batches_shared_rows_and_recomputation_replay_alike(tmp_path: Path) -> None:
    gradients = []
    for policy, knobs in (("none", {}), ("block", {"micro_tokens": 60}), ("none", {"share_prompts": True})):
        r = with_varied_rewards(
            reinforcement(
                tmp_path, a_model(CONFIGS["v3.2"]), indexer_replay=True, max_tokens=24, max_grad_norm=1e9, **knobs
            )
        )
        use_recompute(r.model, policy)  # type: ignore[arg-type]
        step(r)
        gradients.append(r.trainer.gradients.flat.clone())
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-6)


def test_who_cannot_replay_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"zero\.indexer_replay = True: the model has no indexers"):
        reinforcement(tmp_path, indexer_replay=True)
    with pytest.raises(UserError, match=r"zero\.indexer_replay = True: only the engine in the training process"):
        reinforcement(tmp_path, indexer_replay=True, rollouts=Servers(urls=("http://localhost:1",)))
    with pytest.raises(UserError, match="return_indexer_topk = True: the model has no indexers"):
        Engine(Transformer(CONFIG).initialise(0), [], RECORDING)


def test_bytes_per_token() -> None:
    """The docstring's number for V3.2, and int16 for windows of up to 32,768 tokens."""
    meta = torch.device("meta")
    assert Pool(V3_2, 1, torch.bfloat16, meta, choices=("entries",)).choice_bytes == 499_712
    for c in (V3_2, V4_FLASH, CONFIGS["v3.2"]):
        for kinds in ((), ("experts",), ("entries",)):
            pool = pool_of(c, 1, 0, torch.bfloat16, meta, choices=kinds)
            assert pool.choice_bytes == choice_bytes(c, "experts" in kinds, "entries" in kinds)
    plain, both = (Pool(CONFIGS["v3.2"], 1, torch.float32, meta, choices=c) for c in ((), ("experts", "entries")))
    assert (
        plain.choice_bytes == 0
        and both.bytes_per_token - plain.bytes_per_token == 2 * 6 * 2 + 2 * CONFIG.num_experts_per_tok
    )
