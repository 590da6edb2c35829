"""The machinery around GRPO's formulas, on a toy model; test_policy.py tests the formulas."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from finback.checkpoint import models
from finback.checkpoint.export import export
from finback.config import UserError
from finback.data import tokenizer
from finback.engine.request import SamplingParams
from finback.model import logprobs
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.report.export import export_model
from finback.rollouts import rl_health
from finback.rollouts.rollouts import Rollout, rollout
from finback.runs.files import read_lines
from finback.runs.folder import StageRun
from finback.stages import token_detail
from finback.stages.grpo import GRPO
from finback.stages.grpo_sampling import Group
from finback.stages.grpo_training import Reinforcement
from finback.stages.watching import Watch, Watcher
from finback.tasks.gym import Gym
from finback.tasks.judge import Judge
from finback.tasks.math import Chains
from finback.tasks.rewards import Reward
from finback.tasks.task import Problem, Verdict
from finback.train import loop
from finback.train.correction import Correction
from finback.train.grpo_loss import Objective, advantages
from tests.toy import CONFIG, ROOT, V4, WORDS, toy_model

TRUNCATED = Correction(mode="token_truncate")


def reinforcement(folder: Path, model: Transformer | None = None, **knobs: object) -> Reinforcement:
    """A GRPO run on a random toy model that was saved as a finished stage."""
    base = folder / "base"
    if not base.exists():
        base.mkdir()
        tokenizer.train([WORDS], 320, base / "tokenizer.json")
        models.save(base, model or toy_model(1))
        (base / "manifest.json").write_text("{}")
    run = StageRun(folder, "zero", 0, World(), quiet=True)
    run.folder.mkdir(exist_ok=True)
    settings = {
        "start": "base",
        "steps": 3,
        "prompts_per_step": 4,
        "num_generations": 4,
        "max_tokens": 10,
        "task": Chains(2, 3),
    }
    return Reinforcement(GRPO(name="zero", **settings | knobs), run)


def steps(r: Reinforcement, count: int) -> list[dict[str, Any]]:
    """The metrics of that many steps."""
    looped = r.loop()
    return [looped.advance() for _ in range(count)]


def step(r: Reinforcement) -> dict[str, Any]:
    return steps(r, 1)[0]


def gradient(r: Reinforcement) -> torch.Tensor:
    return r.trainer.gradients.flat.clone()


def with_varied_rewards(r: Reinforcement) -> Reinforcement:
    """Rewards every third answer, counted over the run."""
    calls = iter(range(10**6))

    class Third(Reward):
        def parts(self, *args: object) -> dict[str, float]:
            return {"accuracy": float(next(calls) % 3 == 0), "form": 0.0}

    object.__setattr__(r.stage, "reward", Third())
    return r


def test_gap_between_trainer_and_engine_is_flat_at_zero_learning_rate(tmp_path: Path) -> None:
    r = with_varied_rewards(reinforcement(tmp_path, lr=0.0))
    before = {n: t.clone() for n, t in r.model.state_dict().items()}
    metrics = steps(r, 3)
    assert all(m["tokens_with_gradient"] > 0 for m in metrics)
    assert all(m["gap_max"] <= 1e-4 and m["clip_share"] == 0 for m in metrics)
    for name, tensor in r.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_gap_stays_small_while_the_policy_moves_and_mtp_and_bias_do_not(tmp_path: Path) -> None:
    r = with_varied_rewards(reinforcement(tmp_path, lr=1e-3))
    before = {n: t.clone() for n, t in r.model.state_dict().items()}
    metrics = steps(r, 3)
    assert all(m["gap_max"] <= 1e-4 for m in metrics)
    for name, tensor in r.model.state_dict().items():
        stays = name.startswith("mtp.") or name.endswith("router.bias")
        assert torch.equal(tensor, before[name]) == stays, name


@pytest.mark.parametrize("replay", [False, True])
def test_gap_stays_small_for_compressed_attention(replay: bool, tmp_path: Path) -> None:
    """V4: ring buffers and compressed entries in the engine, whole rows in the trainer; hash routing does not change."""
    config = dataclasses.replace(V4, vocab_size=320, max_position_embeddings=256, initializer_range=0.05)
    r = with_varied_rewards(
        reinforcement(tmp_path, lr=1e-3, max_tokens=24, routing_replay=replay, model=Transformer(config).initialise(1))
    )
    before = {n: t.clone() for n, t in r.model.state_dict().items()}
    assert all(m["gap_max"] <= 1e-4 and m["tokens_with_gradient"] > 0 for m in steps(r, 3))
    moved = {n for n, t in r.model.state_dict().items() if not torch.equal(t, before[n])}
    stays = {n for n in before if n.endswith(("router.bias", "router.table")) or ".indexer." in n}
    assert moved == before.keys() - stays
    with pytest.raises(UserError, match="share_prompts"):
        reinforcement(tmp_path, share_prompts=True)


def test_micro_batches_do_not_change_the_update(tmp_path: Path) -> None:
    models_after = []
    for micro in (40, 4096):
        r = with_varied_rewards(reinforcement(tmp_path, lr=1e-2, micro_tokens=micro))
        step(r)
        models_after.append(gradient(r))
    torch.testing.assert_close(models_after[0], models_after[1], rtol=1e-3, atol=1e-6)


def test_groups_without_differences_carry_no_gradient(tmp_path: Path) -> None:
    flat = Reward(accuracy=0.0, form=0.0)
    metrics = step(reinforcement(tmp_path, reward=flat))
    assert metrics["groups_with_gradient"] == metrics["tokens_with_gradient"] == metrics["grad_norm"] == 0


@pytest.mark.parametrize("beta", [0.0, 1e-12])
def test_the_average_is_over_all_tokens_of_the_step(beta: float, tmp_path: Path) -> None:
    """Groups with equal rewards have no gradient but count, with and without a KL term (TRL's loss_type="dapo")."""
    gradients = []
    for average in ("token", "answer"):  # all answers of this model have the maximal length, so the averages must agree
        objective = Objective(beta=beta, average=average)  # type: ignore[arg-type]
        r = reinforcement(tmp_path, objective=objective, max_grad_norm=1e9)
        calls = iter(range(4))

        def earned(group: list[Rollout], calls: Iterator[int] = calls) -> list[dict[str, float]]:
            last = next(calls) == 3
            return [{"accuracy": float(last and k == 0), "form": 0.0} for k in range(len(group))]

        r.sampler.rewarded = earned  # type: ignore[method-assign]
        metrics = step(r)
        assert metrics["groups_with_gradient"] == 0.25 and metrics["truncated"] == 1 and metrics["grad_norm"] > 0
        gradients.append(gradient(r))
    torch.testing.assert_close(*gradients)


def test_the_guides_row_of_r1_is_what_the_paper_says() -> None:
    """8,192 answers at a time, 16 updates of 32 questions each, and a new reference every 400 updates."""
    guide = (ROOT / "docs/guides/r1-road.md").read_text(encoding="utf-8")
    (row,) = [line.split("|") for line in guide.splitlines() if line.startswith("| R1 |")]
    aim, knobs = (cell.strip(" `") for cell in row[2:4])
    r1: GRPO = eval(f"GRPO(name='r1', start='base', task=Chains(), objective=Objective({aim}), {knobs})")
    assert r1.prompts_per_step / r1.updates == 32 and r1.prompts_per_step * r1.num_generations == 8192
    assert r1.updates * r1.reference_steps == 400
    assert r1.objective == Objective(epsilon_low=10, epsilon_high=10, average="answer", beta=0.001)


SOUND = {"truncated": 0.1, "groups_with_gradient": 0.5, "accuracy": 0.5, "well_formed": 0.9}


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({}, None),
        ({"groups_with_gradient": 0.0}, "get the same reward"),
        ({"groups_with_gradient": 0.0, "accuracy": 0.0}, "no answer is right"),
        ({"groups_with_gradient": 0.0, "accuracy": 0.0, "well_formed": 0.0}, "no answer has the required form"),
        ({"groups_with_gradient": 0.0, "accuracy": 1.0}, "ask harder questions"),
        ({"truncated": 1.0}, "every answer was cut off"),
    ],
)
def test_why_a_step_taught_nothing(metrics: dict[str, float], words: str | None) -> None:
    found = rl_health.cause(SOUND | metrics)
    assert words in found if words else found == ""


def saying(r: Reinforcement, metrics: dict[str, float]) -> Reinforcement:
    """A run in which every step reports these metrics of its answers."""
    describe = r.sampler.describe
    r.sampler.describe = lambda *groups: describe(*groups) | SOUND | metrics  # type: ignore[method-assign]
    return r


def test_rl_that_teaches_nothing_says_so_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = {"groups_with_gradient": 0.0, "accuracy": 0.0}
    r = saying(reinforcement(tmp_path, steps=50, patience=7), nothing)
    r.run.quiet = False
    with pytest.raises(
        UserError, match=r"zero\.patience = 7: nothing was learned in the last 7 steps: no answer is right"
    ):
        loop.run(r)
    assert capsys.readouterr().err.count("warning: nothing was learned in 5 steps") == 1
    assert len(read_lines(r.run.folder / "metrics.jsonl")) == 7
    again = saying(reinforcement(tmp_path, steps=50, patience=9), nothing)
    with pytest.raises(UserError, match="in the last 9 steps"):  # resumes from where it stopped
        loop.run(again)
    assert len(read_lines(r.run.folder / "metrics.jsonl")) == 9


def test_rl_whose_every_answer_is_right_is_done(tmp_path: Path) -> None:
    r = saying(reinforcement(tmp_path, steps=50, patience=6), {"groups_with_gradient": 0.0, "accuracy": 1.0})
    assert loop.run(r)["steps"] == 6


def test_defaults_follow_the_model_and_the_precision() -> None:
    assert (rl_health.max_gap(None, "fp32"), rl_health.max_gap(None, "bf16")) == (1e-2, 0.2)
    assert rl_health.max_gap(0.5, "fp32") == 0.5


def test_shuffled_rewards_are_the_same_rewards_elsewhere(tmp_path: Path) -> None:
    r = reinforcement(tmp_path, shuffle_rewards=True)
    groups = [Group([], [{"accuracy": float((4 * g + k) ** 2)} for k in range(4)], [True] * 4) for g in range(4)]
    plain = advantages(torch.tensor([g.rewards for g in groups]))
    r.sampler.give_advantages(groups, 1)
    shuffled = torch.tensor([g.advantages for g in groups])
    assert not torch.equal(shuffled, plain)
    rewards = torch.tensor([g.rewards for g in groups]).flatten()
    order = torch.tensor(reinforcement(tmp_path).sampler.shuffled_places(16, 1))
    torch.testing.assert_close(shuffled, advantages(rewards[order].view(4, 4)))
    assert sorted(order.tolist()) == list(range(16)), "each reward is assigned once"


def test_rl_runs_on_a_reasoning_gym_task(tmp_path: Path) -> None:
    r = reinforcement(tmp_path, task=Gym("basic_arithmetic"), max_tokens=6)
    metrics = step(r)
    assert metrics["accuracy"] == 0 and metrics["length"] > 0
    with pytest.raises(UserError, match=r"zero\.task"):
        reinforcement(tmp_path, task="chain_sum")


def test_a_gap_above_the_limit_stops_the_run(tmp_path: Path) -> None:
    r = reinforcement(tmp_path, max_gap=1e-3)
    with pytest.raises(UserError, match=r"max_gap = 0\.001"):
        r.after(r.loop(), {"gap_mean": 0.5})


def test_training_on_a_reward_raises_it(tmp_path: Path) -> None:
    """The sign is right: rewards for the lower half of the vocabulary make it more frequent."""
    r = reinforcement(tmp_path, lr=3e-3, prompts_per_step=8, num_generations=8, max_tokens=4, steps=90)
    rewarded = r.sampler.rewarded

    def paid(group: list[Rollout]) -> list[dict[str, float]]:
        parts = rewarded(group)
        for each, x in zip(parts, group, strict=True):
            each["accuracy"] = sum(t < 160 for t in x.completion.tokens) / len(x.completion.tokens)
        return parts

    r.sampler.rewarded = paid  # type: ignore[method-assign]
    rewards = [m["reward"] for m in steps(r, 30)]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1


def test_rl_starts_from_a_hugging_face_folder_and_goes_out_as_one(tmp_path: Path) -> None:
    words = tokenizer.train([WORDS], 320, tmp_path / "tokenizer.json")
    export(toy_model(1), tmp_path / "open", "fp32", extras=words.export)
    r = reinforcement(tmp_path, start=str(tmp_path / "open"), steps=1)
    loop.run(r)
    trained = tmp_path / "zero"
    assert models.load(trained).config == r.model.config
    files = export_model(trained, tmp_path / "out", "bf16")
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"} <= {
        f.name for f in files
    }
    back = models.load(tmp_path / "out").state_dict()
    kept = {n: t for n, t in r.model.state_dict().items() if n.endswith("router.bias")}
    assert kept and all(torch.equal(back[n], t) for n, t in kept.items())
    assert all((back[n] - t).abs().max() <= t.abs().max() / 128 for n, t in r.model.state_dict().items())


def gradient_after(folder: Path, **knobs: object) -> torch.Tensor:
    """The gradient of a run's first step, before clipping."""
    r = with_varied_rewards(reinforcement(folder, max_grad_norm=1e9, **knobs))
    step(r)
    return gradient(r)


def test_knobs_that_say_nothing_at_the_first_update_change_nothing(tmp_path: Path) -> None:
    plain = gradient_after(tmp_path)
    for aim in (
        Objective(correction=TRUNCATED),
        Objective(correction=Correction(mode="sequence_mask", clip_min=0.5, geometric_mask=(0.9, 1.1))),
        Objective(correction=Correction(off_policy_mask_threshold=1e-3)),
        Objective(dual_clip=3.0),
        Objective(beta=0.1),
        Objective(epsilon_high=10.0),
    ):
        # at the start the policy equals the reference, where k3 is flat, and the trainer agrees with the engine
        torch.testing.assert_close(gradient_after(tmp_path, objective=aim), plain, rtol=1e-3, atol=1e-6)
    kl = gradient_after(tmp_path, objective=Objective(beta=0.1, kl_estimator="k1"))
    assert not torch.allclose(kl, plain, rtol=1e-2), "k1 as a loss is noise even there"


def test_averaging_per_answer_counts_every_answer_once(tmp_path: Path) -> None:
    """Micro-batches must not change the meaning of 1/|o| and 1/G."""
    aim = Objective(average="answer")
    one, two = (gradient_after(tmp_path, objective=aim, micro_tokens=m) for m in (40, 4096))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def test_several_updates_and_epochs_move_further_and_clip(tmp_path: Path) -> None:
    knobs: dict[str, object] = {"lr": 3e-2, "max_grad_norm": 1e9}
    r = with_varied_rewards(reinforcement(tmp_path, updates=2, epochs=3, **knobs))
    metrics = step(r)
    assert metrics["clip_share"] > 0 and metrics["gap_max"] <= 1e-4, "the gap is measured before the first update"
    (adam,) = r.trainer.optimizers
    assert {int(t) for n, t in adam.state().items() if n.endswith(".step")} == {6}
    with pytest.raises(UserError, match=r"zero\.updates = 3"):
        reinforcement(tmp_path, updates=3)


def test_the_reference_stays_until_it_is_refreshed_and_survives_resuming(tmp_path: Path) -> None:
    aim = Objective(beta=0.1)
    r = with_varied_rewards(reinforcement(tmp_path, lr=1e-2, objective=aim, reference_steps=2))
    looped = r.loop()
    assert looped.advance()["kl"] == pytest.approx(0, abs=1e-6)
    assert r.reference is not None
    start = r.reference.model.head.weight.clone()
    looped.checkpoint()
    assert not torch.equal(start, r.model.head.weight)
    again = with_varied_rewards(reinforcement(tmp_path, lr=1e-2, objective=aim, reference_steps=2))
    resumed = again.loop()
    resumed.restore()
    assert again.reference is not None and torch.equal(again.reference.model.head.weight, start)
    assert resumed.advance()["kl"] > 1e-6
    assert torch.equal(again.reference.model.head.weight, again.model.head.weight), "refreshed after step 2"


def test_groups_that_say_nothing_are_replaced(tmp_path: Path) -> None:
    r = reinforcement(tmp_path, resample=2)
    plain = {"accuracy": 0.0, "form": 0.0}
    calls = 0

    def earned(group: list[Rollout]) -> list[dict[str, float]]:
        nonlocal calls
        calls += 1
        if calls in (1, 2, 5):  # the first two questions, and the first of their replacements
            return [plain] * len(group)
        return [plain | {"accuracy": float(i == 0)} for i in range(len(group))]

    r.sampler.rewarded = earned  # type: ignore[method-assign]
    metrics = step(r)
    assert calls == 7 and metrics["answers"] == 28 and metrics["groups_with_gradient"] == 1
    lines = read_lines(r.run.folder / "samples.jsonl")
    assert len(lines) == 28 and sum(line["advantage"] is None for line in lines) == 12


def test_long_answers_cost_and_cut_ones_teach_nothing(tmp_path: Path) -> None:
    r = reinforcement(tmp_path, overlong=4, overlong_penalty=0.5)
    metrics = step(r)
    lines = read_lines(r.run.folder / "samples.jsonl")
    for line in lines:
        assert line["reward"]["overlong"] == pytest.approx(-0.125 * max(0, line["tokens"] - 6))
    assert metrics["reward_overlong"] == pytest.approx(sum(x["reward"]["overlong"] for x in lines) / 16)
    masked = with_varied_rewards(reinforcement(tmp_path, mask_truncated=True, max_tokens=3))
    metrics = step(masked)
    assert metrics["truncated"] > 0.5
    whole = [x for x in read_lines(masked.run.folder / "samples.jsonl")[16:] if x["finish"] == "stop"]
    assert metrics["tokens_with_gradient"] == sum(x["tokens"] for x in whole if x["advantage"])


def test_cut_answers_do_not_measure_the_others(tmp_path: Path) -> None:
    """Rewards 1, 0 and 0.5 for a cut answer, which is masked and changes neither mean nor std; a lone answer idles."""
    r = reinforcement(tmp_path, mask_truncated=True)
    groups = [
        Group([], [{"accuracy": x} for x in rewards], counted)
        for rewards, counted in (
            ((1.0, 0.0, 0.5), [True, True, False]),
            ((1.0, 0.0, 0.0), [True, False, False]),
            ((1.0, 0.0, 0.0), [False, False, False]),
        )
    ]
    r.sampler.give_advantages(groups, 1)
    assert [g.advantages for g in groups] == [[1, -1, 0], [0, 0, 0], [0, 0, 0]]
    assert [g.differs for g in groups] == [True, False, False]
    asked, _ = reinforcement(tmp_path, mask_truncated=True, max_tokens=3, resample=1).sampler.sample(1)
    cut = [x.completion.finish_reason == "length" for g in asked for x in g.rollouts]
    assert any(cut) and [not c for g in asked for c in g.counted] == cut


@pytest.mark.parametrize("ranks", [1, 2])
def test_updates_share_out_all_answers_at_random(ranks: int, tmp_path: Path) -> None:
    """Each answer is in one update, updates have equal sizes and mix questions; the number of ranks changes nothing."""
    r = reinforcement(tmp_path, updates=2, prompts_per_step=8)
    shares: list[set[tuple[int, int]]] = [set(), set()]
    for rank in range(ranks):
        r.sampler.world = World(rank, ranks)
        places = range(rank, 8, ranks)
        groups = [Group([(i, k) for k in range(4)], [{}] * 4, [True] * 4, [0.5] * 4) for i in places]  # type: ignore[misc]
        for share, pairs in zip(shares, r.sampler.of_updates(groups, 3), strict=True):
            share |= {answer for answer, _ in pairs}  # type: ignore[misc]
    assert len(shares[0]) == len(shares[1]) == 16 and not shares[0] & shares[1]
    assert len({i for i, _ in shares[0]}) > 4, "updates must mix questions"
    order = torch.randperm(32, generator=torch.Generator().manual_seed(r.run.seed("updates", 3))).tolist()
    assert shares[0] == {divmod(place, 4) for place in order[:16]}


@pytest.mark.parametrize("share", [False, True])
def test_probabilities_are_counted_among_what_could_be_drawn(share: bool, tmp_path: Path) -> None:
    """With top-k and top-p, trainer and engine agree on each token, and the ratio ignores the excluded probability."""
    knobs = {"top_k": 40, "top_p": 0.8, "lr": 1e-2, "share_prompts": share, "micro_tokens": 60, "updates": 2}
    r = with_varied_rewards(reinforcement(tmp_path, objective=Objective(beta=0.01), **knobs))
    asked, _ = r.sampler.sample(7)
    done = [x.completion for g in asked for x in g.rollouts]
    sizes = {len(ids) for c in done for ids in c.sampling_mask or ()}
    assert len(sizes) > 1 and min(sizes) >= 1 and max(sizes) <= 40
    assert all(t in set(ids) for c in done for t, ids in zip(c.tokens, c.sampling_mask or (), strict=True))
    metrics = steps(r, 2)
    assert all(m["gap_max"] <= 1e-4 for m in metrics) and metrics[0]["entropy"] < 4
    plain = reinforcement(tmp_path)
    (completion, *_) = (x.completion for g in plain.sampler.sample(7)[0] for x in g.rollouts)
    assert completion.sampling_mask is None


def test_log_probabilities_among_some_ids_by_hand(tmp_path: Path) -> None:
    """p = 1/2, 1/4, 1/8, 1/8 over four ids; restricted to the first and the third: 4/5 and 1/5."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]] * 2).log()
    kept = torch.tensor([[0, 2, -1], [3, 1, 0]], dtype=torch.int32)
    found = logprobs.only(logits, kept).softmax(-1)
    torch.testing.assert_close(found, torch.tensor([[0.8, 0, 0.2, 0], [4 / 7, 2 / 7, 0, 1 / 7]]))


def test_rl_in_bf16_keeps_fp32_masters_and_a_gap_that_bf16_explains(tmp_path: Path) -> None:
    r = with_varied_rewards(reinforcement(tmp_path, compute="bf16", lr=1e-3, max_tokens=16))
    metrics = steps(r, 2)
    assert all(p.dtype == torch.float32 for p in r.model.parameters())
    assert all(1e-5 < m["gap_mean"] < 3e-2 for m in metrics)


def test_biases_move_only_when_asked_and_by_the_load_of_the_update_alone(tmp_path: Path) -> None:
    r = with_varied_rewards(
        reinforcement(tmp_path, bias_speed=0.01, lr=0.0, objective=Objective(beta=0.1, correction=TRUNCATED))
    )
    before = [router.bias.clone() for router in r.model.routers()]
    metrics = step(r)
    (load,) = metrics["expert_load"]
    assert sum(load) == pytest.approx(1, abs=1e-3)
    moved = r.model.routers()[0].bias - before[0]
    expected = 0.01 * torch.sign(0.25 - torch.tensor(load))
    torch.testing.assert_close(moved, expected - expected.mean(), atol=1e-6, rtol=0)
    assert torch.equal(r.model.routers()[1].bias, before[1]), "the MTP module's must not change"


def test_samples_are_kept_and_rewound(tmp_path: Path) -> None:
    r = reinforcement(tmp_path)
    steps(r, 2)
    path = r.run.folder / "samples.jsonl"
    assert [line["step"] for line in read_lines(path)] == [1] * 16 + [2] * 16
    r.run.rewind(2)
    lines = read_lines(path)
    assert {line["step"] for line in lines} == {1} and len(lines) == 16
    assert {"question", "gold", "thinking", "answer", "reward", "advantage", "finish"} <= lines[0].keys()


def detail_of(r: Reinforcement, prompt: list[int], tokens: list[int]) -> tuple[list[float], list[list[list[int]]]]:
    """The log-probabilities of an answer's tokens by a plain pass of the model, and the experts of the tokens read."""
    sent: list[list[list[int]]] = []
    routers = [block.feed_forward.router for block in r.model.blocks if hasattr(block.feed_forward, "router")]
    hooks = [x.register_forward_hook(lambda _, given, made: sent.append(made[0].tolist())) for x in routers]
    with torch.no_grad():
        logits = r.model.head(r.model(torch.tensor([prompt + tokens])[:, :-1]))[0]
    for hook in hooks:
        hook.remove()
    at = len(prompt) - 1
    found = torch.log_softmax(logits[at:].float() / r.stage.temperature, -1).gather(1, torch.tensor(tokens)[:, None])
    return found[:, 0].tolist(), [list(layers) for layers in zip(*(layer[at + 1 :] for layer in sent), strict=True)]


def test_watched_prompts_are_answered_as_the_model_is_and_change_nothing(tmp_path: Path) -> None:
    for name in ("plain", "watched"):
        (tmp_path / name).mkdir()
    # two of three layers with experts are recorded; the first layer has none
    model = Transformer(dataclasses.replace(CONFIG, num_hidden_layers=4, initializer_range=0.2)).initialise(1)
    plain, watched = (
        with_varied_rewards(reinforcement(tmp_path / name, model, lr=1e-2, watch=watch))
        for name, watch in (("plain", None), ("watched", Watch(("1+1=?", "Hello"), every_steps=2)))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_detail, "MOST_LAYERS", 2)
        watched.stopping.watcher = Watcher(watched)
    problems = [Problem(text, "2", text) for text in ("1+1=?", "Hello")]
    said = rollout(plain.rollouts, plain.tokenizer, plain.stage.task, problems, [0, 0], SamplingParams(0.0, 10))
    found: list[list[dict[str, Any]]] = []
    told: list[Any] = []  # a plain pass over the first watched answer at steps 0 and 2
    for r in (plain, watched):
        looped = r.loop()
        r.before(looped)
        first = (said[0].prompt, list(said[0].completion.tokens))
        told.append(detail_of(r, *first))
        found.append([])
        for step in range(1, 4):
            found[-1].append(looped.advance())
            r.after(looped, found[-1][-1])
            if step == 2:
                told.append(detail_of(r, *first))
    for name in ("loss", "reward", "grad_norm", "gap_max"):
        assert [m[name] for m in found[0]] == [m[name] for m in found[1]]
    path = watched.run.folder / "watched.jsonl"
    lines = list(read_lines(path))
    assert [(line["step"], line["question"]) for line in lines] == [(s, p.question) for s in (0, 2) for p in problems]
    assert [line["answer"] for line in lines[:2]] == [r.response.answer for r in said]
    assert all(line["correct"] is None for line in lines) and "flops_evaluation" in watched.stage.declaration().ledger
    assert "".join(lines[0]["pieces"]) == plain.tokenizer.decode(said[0].completion.tokens)
    (now, experts), (later, _) = told[2:]
    assert lines[0]["logprobs"] == pytest.approx(now, abs=2e-4) and "former_logprobs" not in lines[0]
    assert lines[2]["former_logprobs"] == pytest.approx(later, abs=2e-4) and lines[2]["former_logprobs"] != now
    assert lines[0]["expert_layers"] == [1, 3] and lines[0]["experts"] == [[a, c] for a, _, c in experts]
    assert watched.stopping.state()["watcher"] == {"former": watched.stopping.watcher.former}
    samples = list(read_lines(watched.run.folder / "samples.jsonl"))
    group = [s for s in samples if "pieces" in s]
    assert len(group) == 4 and {(s["step"], s["question"]) for s in group} == {(2, group[0]["question"])}
    assert any(s["logprobs"] != s["new_logprobs"] for s in group if s["advantage"])
    assert all(len(s["pieces"]) == s["tokens"] == len(s["new_logprobs"]) for s in group)
    risen = [sum(s["new_logprobs"]) - sum(s["logprobs"]) for s in sorted(group, key=lambda s: -s["advantage"])]
    assert risen[0] > risen[-1]  # answers with higher rewards have become likelier than others
    watched.run.rewind(2)
    assert [line["step"] for line in read_lines(path)] == [0, 0]
    assert watched.stage.work().tokens_generated - plain.stage.work().tokens_generated == 2 * 2 * 10
    with pytest.raises(UserError, match="no prompts"):
        Watch("1+1=?")  # type: ignore[arg-type]


def test_a_prefilled_chain_is_judged_as_one(tmp_path: Path) -> None:
    r = reinforcement(tmp_path, think=True)
    asked, _ = r.sampler.sample(1)
    rollouts = [x for g in asked for x in g.rollouts]
    assert all(x.response.thinks and x.prompt[-1] == r.tokenizer.ids["<think>"] for x in rollouts)


@dataclass(frozen=True)
class Longest(Judge):
    """Prefers the longest answer of a group."""

    def prefer(self, question: str, answers: Sequence[str]) -> list[float]:
        return [float(len(a) == max(map(len, answers))) for a in answers]


class Anything(Chains):
    """Accepts no answer as correct and any as well-formed, so that only a judge can decide."""

    def check(self, problem: Problem, answer: str) -> Verdict:
        return Verdict(correct=False, well_formed=bool(answer))


def test_a_judge_decides_where_no_check_can(tmp_path: Path) -> None:
    reward = Reward(accuracy=0.0, form=0.0, preference=1.0, judge=Longest("http://127.0.0.1:1/v1", "any"))
    r = reinforcement(
        tmp_path, reward=reward, task=Anything(2, 3), max_tokens=24, prompts_per_step=8, num_generations=8
    )
    metrics = step(r)
    lines = read_lines(r.run.folder / "samples.jsonl")
    whole = [x for x in lines if x["finish"] == "stop" and x["answer"]]
    assert whole and metrics["reward_preference"] == pytest.approx(sum(x["reward"]["preference"] for x in lines) / 64)
    assert all(x["reward"]["preference"] == 0 for x in lines if x["finish"] != "stop")
    assert any(x["advantage"] > 0 for x in whole)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"temperature": 0.0}, "zero.temperature = 0.0"),
        ({"top_p": 0.0}, r"zero\.top_p = 0\.0"),
        ({"top_k": -1}, r"zero\.top_k = -1"),
        ({"num_generations": 1}, "zero.num_generations = 1"),
        ({"updates": 3}, "zero.updates = 3"),
        ({"overlong": 11}, "zero.overlong = 11"),
        ({"epochs": 0}, "zero.epochs = 0"),
        ({"lr": -1e-4}, r"zero\.lr = .*negative"),
        ({"max_grad_norm": 0.0}, r"zero\.max_grad_norm"),
        ({"final_lr": -0.1}, r"zero\.final_lr"),
        ({"steps": -1}, r"zero\.steps"),
        ({"micro_tokens": 0}, r"zero\.micro_tokens"),
        ({"bias_speed": -0.1}, r"zero\.bias_speed"),
        ({"lr": float("inf")}, r"zero\.lr = inf: .*NaN or infinity"),
        ({"overlong": 4, "overlong_penalty": 0.95}, "a right answer could earn less than a wrong one"),
    ],
)
def test_impossible_knobs_are_named(knobs: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        reinforcement(tmp_path, **knobs)


def test_a_step_without_anything_to_learn_changes_nothing(tmp_path: Path) -> None:
    r = reinforcement(tmp_path, mask_truncated=True, max_tokens=1)
    before = {n: t.clone() for n, t in r.model.state_dict().items()}
    metrics = step(r)
    assert metrics["tokens_with_gradient"] == 0 and metrics["loss"] == 0
    assert all(torch.equal(t, before[n]) for n, t in r.model.state_dict().items())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_stops_the_run(value: float, tmp_path: Path) -> None:
    r = with_varied_rewards(reinforcement(tmp_path))
    finish = r.trainer.finish

    def broken(max_norm: float) -> float:
        r.trainer.gradients.flat[0] = value
        return finish(max_norm)

    r.trainer.finish = broken  # type: ignore[method-assign]
    before = {n: t.clone() for n, t in r.model.state_dict().items()}
    with pytest.raises(UserError, match=r"zero\.lr = .*not finite at step 1"):
        step(r)
    assert all(torch.equal(t, before[n]) for n, t in r.model.state_dict().items())
    with pytest.raises(UserError, match=r"max_gap"):
        r.after(r.loop(), {"gap_mean": float("nan")})


def test_the_learning_rate_is_what_its_knob_says(tmp_path: Path) -> None:
    """Rises to lr during the warm-up, stays for two thirds of the steps, then falls to final_lr times lr."""
    r = reinforcement(tmp_path, steps=30, lr=1e-3, warmup=4, final_lr=0.1)
    rates = [r.stopping.lr(step) for step in range(1, 31)]
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert set(rates[3:20]) == {1e-3} and rates[24] == pytest.approx(5.5e-4) and rates[29] == pytest.approx(1e-4)
    assert reinforcement(tmp_path, steps=1, lr=1e-3).stopping.lr(1) == 1e-3
    assert step(r)["lr"] == pytest.approx(2.5e-4)


def test_a_question_too_long_for_the_window_is_named(tmp_path: Path) -> None:
    """The error names the question and not the engine's request, which the user never made."""
    r = reinforcement(tmp_path, max_tokens=10)
    window = r.model.config.max_position_embeddings
    problem = Problem("1+1 " * window, "2", key="long")
    with pytest.raises(UserError, match=r"question = '1\+1 .*…': its \d+ tokens and max_tokens = 10 exceed"):
        r.sampler.ask([problem], [("answer", 1, 0)])
