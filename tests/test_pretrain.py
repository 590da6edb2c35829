"""The pre-training loop: schedules in tokens, ramps, spikes, averages, router statistics, recomputation, extension."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finback.checkpoint import models, store
from finback.config import UserError
from finback.data.sources import Files
from finback.model.recompute import Policy, use_recompute
from finback.model.rope_scaling import Yarn
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.report.export import export_model
from finback.runs import processor
from finback.runs.files import read_lines
from finback.runs.folder import Interrupted, StageRun
from finback.runs.recipe import Recipe
from finback.stages import pretrain_setup
from finback.stages.extend import Extend
from finback.stages.prepare import Prepare
from finback.stages.pretrain import Pretrain, Probe
from finback.stages.pretrain_setup import set_up
from finback.stages.pretraining import Pretraining
from finback.tasks.math import Chains
from finback.train import loop, rates, router_health, trainer
from finback.train.batch import Batch, of_rows
from finback.train.ema import EMA
from finback.train.loss import Losses, training_losses
from finback.train.rates import Phase, along, level, ramp
from finback.train.spikes import ENOUGH, Spikes
from tests.toy import CONFIG, V4, WORDS, backward, backward_batch, environment, toy_model

TRILLION = 10**12


def test_phases_are_v3s_schedule() -> None:
    """V3 4.2: 2,000 warm-up steps, constant to 10T, a cosine to a tenth over 4.3T, 333B there, 167B at 7.3e-6."""
    warm = 2000 * 3072 * 4096
    v3 = (
        Phase(warm, 0.0, 1.0),
        Phase(10 * TRILLION - warm),
        Phase(4_300_000_000_000, 1.0, 0.1, "cosine"),
        Phase(333_000_000_000, 0.1, 0.1),
        Phase(167_000_000_000, 7.3 / 220, 7.3 / 220),
    )
    assert sum(p.tokens for p in v3) == 14_800_000_000_000
    assert along(v3, warm // 2) == pytest.approx(0.5) and along(v3, 9 * TRILLION) == 1.0
    assert 2.2e-4 * along(v3, 12_150_000_000_000) == pytest.approx(2.2e-4 * 0.55)  # half-way down the cosine
    assert 2.2e-4 * along(v3, 14_500_000_000_000) == pytest.approx(2.2e-5)
    assert 2.2e-4 * along(v3, 14_700_000_000_000) == pytest.approx(7.3e-6)
    assert along(v3, 20 * TRILLION) == pytest.approx(7.3 / 220)


def test_levels_change_at_their_token() -> None:
    assert [level(((0, 0.3), (100, 0.1)), t) for t in (0, 99, 100, 10**6)] == [0.3, 0.3, 0.1, 0.1]
    assert level(0.5, 7) == 0.5
    for pairs in ((), ((5, 0.1),), ((0, 0.1), (9, 0.2), (3, 0.1)), ((0, -0.1),)):
        with pytest.raises(UserError, match=r"base\.mtp_weight"):
            pretrain(mtp_weight=pairs)


def test_rows_come_up_in_multiples_of_the_first() -> None:
    rows = [ramp(t, 3072, 15360, 469_000_000_000) for t in (0, 10**9, 118 * 10**9, 300 * 10**9, 469 * 10**9)]
    assert rows == [3072, 3072, 6144, 9216, 15360]
    assert all(ramp(t, 4, 10, 100) in (4, 8) for t in range(100)) and ramp(100, 4, 10, 100) == 10


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a finished prepare stage."""
    root = tmp_path_factory.mktemp("runs")
    (root / "words.txt").write_text(WORDS, encoding="utf-8")
    stage = Prepare(name="prepare", text=(Files((str(root / "words.txt"),), name="words"),), vocab_size=320)
    run = StageRun(root, "prepare", 0, World(), quiet=True)
    run.folder.mkdir()
    run.finish(stage.run(run))
    return root


def pretrain(kind: type[Pretrain] = Pretrain, **knobs: Any) -> Pretrain:
    settings = {
        "name": "base",
        "data": "prepare",
        "mixture": {"words": 1.0},
        "batch_size": 4,
        "seq_len": 16,
        "compute": "fp32",
        "phases": (Phase(256, 0.0, 1.0), Phase(1024)),
        "checkpoint_steps": 5,
        "router_steps": 2,
    }
    if "start" not in knobs:
        settings["model"] = CONFIG
    return kind(**settings | knobs)


def begin(root: Path, stage: Pretrain) -> Pretraining:
    run = StageRun(root, stage.name, 0, World(), quiet=True)
    run.folder.mkdir(exist_ok=True)
    return set_up(stage, run)


def trained(root: Path, name: str, **knobs: Any) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    """Results, metrics and folder of a finished stage."""
    stage = pretrain(name=name, **knobs)
    training = begin(root, stage)
    results = loop.run(training)
    training.run.finish(results)
    return results, read_lines(root / name / "metrics.jsonl"), root / name


def interrupted(training: Pretraining, stops: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a training until it is interrupted after so many of its steps."""
    seen = iter(range(1, 100))
    monkeypatch.setattr(training.run, "check_stop", lambda: next(seen) >= stops)
    with pytest.raises(Interrupted):
        loop.run(training)


def test_phases_end_the_run_and_set_the_rate(prepared: Path) -> None:
    results, log, _ = trained(prepared, "phased")
    assert results["tokens"] == 1280 == pretrain().work().tokens_trained and len(log) == 20
    assert [r["lr"] for r in log[:4]] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3]) and log[-1]["lr"] == 8e-3
    assert results["probe_reached"] is None and results["skipped_steps"] == results["rewinds"] == 0


def test_compressed_attention_learns_from_packed_rows(prepared: Path) -> None:
    """V4's parts with documents that share rows; if all entries are selected the indexers have no gradient."""
    model = dataclasses.replace(V4, vocab_size=CONFIG.vocab_size, index_topk=4)
    _, log, folder = trained(prepared, "v4", model=model, document_mask=True, recompute="block", bias_speed=0.01)
    assert log[-1]["loss"] < 0.95 * log[0]["loss"] and "indexer_loss" not in log[0]
    seed = StageRun(prepared, "v4", 0, World(), quiet=True).seed("weights")
    learnt, started = models.load(folder).state_dict(), Transformer(model).initialise(seed).state_dict()
    stays = {n for n in learnt if ".indexer." in n or n.endswith("router.table")}
    assert {n for n in learnt if torch.equal(learnt[n], started[n])} == stays


def test_a_ramp_takes_more_rows_and_counts_their_tokens(prepared: Path) -> None:
    results, log, _ = trained(prepared, "ramped", batch_size=8, batch_size_start=2, ramp_tokens=640)
    rows = [r["batch_size"] for r in log]
    assert rows[0] == 2 and rows[-1] == 8 and sorted(rows) == rows and {4, 6} <= set(rows)
    assert [r["tokens"] for r in log] == [16 * sum(rows[: i + 1]) for i in range(len(rows))]
    assert sum(results["tokens_by_source"].values()) == results["tokens"] == log[-1]["tokens"]


def test_a_probe_is_asked_once_for_each_of_its_lengths(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also during small steps, and after a rewind to weights that were probed before."""
    asked: list[int] = []

    def probe(training: Pretraining, *_: object) -> float:
        asked.append(training.tokens)
        return 0.0

    monkeypatch.setattr(Pretraining, "_probe", probe)
    knobs: dict[str, Any] = {"probe": Probe(task=Chains(2, 3), at_least=0.9, every_tokens=160), "phases": ()}
    ramp = {"batch_size": 8, "batch_size_start": 2, "ramp_tokens": 640}
    end = {"warmup_tokens": 64, "decay_tokens": 320, "max_tokens": 1280}
    broken_at(monkeypatch, 6, 7, 8)
    results, log, _ = trained(prepared, "probed", **knobs, **ramp, **end)
    assert results["rewinds"] == 1 and [r["step"] for r in log if "rewound_from" in r] == [5]
    # 2 rows of 16 tokens per step up to the checkpoint at 160, and steps 6 to 8 are rewound; later 4, 6 and 8 rows
    looked = [r["tokens"] for r in log if "probe" in r]
    assert looked == sorted(set(looked)) and looked[0] == 160
    learnt = [0, *(r["tokens"] for r in log if "loss" in r)]
    crossed = [b for a, b in itertools.pairwise(learnt) if a // 160 < b // 160 and a < 960]
    assert looked == crossed == list(dict.fromkeys(asked))
    assert len(asked) - len(looked) <= 1, "only rewound steps are probed again"


@pytest.mark.parametrize(("others", "chosen"), [("bf16", "bf16"), ("fp32", "fp32")])
def test_ranks_choose_one_precision(others: str, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks use the precision that every rank supports; a resumed stage reads it from its folder."""
    monkeypatch.setattr(processor, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(World, "gather", lambda world, mine: [mine, others])
    run = StageRun(tmp_path, "base", 0, World(), quiet=True)
    run.folder.mkdir()
    wide = dataclasses.replace(CONFIG, hidden_size=128)
    for _ in range(2):
        assert pretrain_setup._precision(pretrain(compute="auto"), wide, run, World()) == chosen
        monkeypatch.setattr(World, "gather", lambda world, mine: [mine, "bf16"])
    assert pretrain_setup._precision(pretrain(compute="fp8"), wide, run, World()) == "fp8"


def test_a_window_below_that_of_validation_is_compressed_in_shorter_pieces(prepared: Path) -> None:
    short = dataclasses.replace(CONFIG, max_position_embeddings=16)
    results, _, _ = trained(prepared, "short", model=short, phases=(Phase(64),))
    assert 0 < results["bits_per_byte"]["words"] < 10


def test_weights_and_speeds_follow_their_levels(prepared: Path) -> None:
    knobs = {"mtp_weight": ((0, 0.3), (640, 0.0)), "bias_speed": ((0, 0.01), (640, 0.0))}
    _, log, folder = trained(prepared, "levels", **knobs)
    assert all((r["mtp_loss"] > 0) == (r["tokens"] < 640) for r in log)
    biases = [r["bias"] for r in read_lines(folder / "router.jsonl")]
    assert biases[0] != biases[3] and biases[4] == biases[-1], "the biases stay constant once their speed is 0"


def test_adamw_for_everything(prepared: Path) -> None:
    _, log, _ = trained(prepared, "adamw", optimizer="adamw", adam_lr=3e-3)
    assert log[-1]["lr"] == 3e-3 and log[-1]["loss"] < log[0]["loss"]


def test_fp8_is_not_bf16_and_learns(prepared: Path) -> None:
    """Emulated here: from the same weights and rows the loss differs slightly, and it falls."""
    logs = [trained(prepared, f"in-{c}", compute=c)[1] for c in ("bf16", "fp8")]
    bf16, fp8 = ([r["loss"] for r in log] for log in logs)
    assert bf16 != fp8 and fp8[-1] < fp8[0] - 0.5
    assert max(abs(a / b - 1) for a, b in zip(bf16, fp8, strict=True)) < 0.05


def test_routers_are_described(prepared: Path) -> None:
    """Load shares of every layer, without padding; the MTP module's router is the last."""
    results, log, folder = trained(prepared, "health", bias_speed=0.01)
    lines = read_lines(folder / "router.jsonl")
    assert [r["step"] for r in lines] == list(range(2, 21, 2))
    assert all(len(r["load"]) == 2 and len(r["load"][0]) == 4 for r in lines)
    assert all(sum(layer) == pytest.approx(1, abs=1e-3) for r in lines for layer in r["load"])
    for line in lines:
        worst = max(max(layer) * 4 - 1 for layer in line["load"])
        assert log[line["step"] - 1]["max_violation"] == pytest.approx(worst, abs=2e-3)
    assert lines[-1]["bias_spread"][0] > 0 and "router.jsonl" not in results


@pytest.mark.parametrize("mask", [False, True])
def test_whole_documents_in_rows(prepared: Path, mask: bool) -> None:
    """Padding has no labels and no load; a step is the same on any number of ranks that share its rows."""
    knobs = {"packing": "best_fit", "document_mask": mask, "seq_len": 48, "name": f"fitted-{int(mask)}"}
    training = begin(prepared, pretrain(**knobs))
    model, gradients = training.trainer.model, training.trainer.gradients  # type: ignore[attr-defined]
    drawn = training.loader.draw(4, document_ids=mask)
    rows = of_rows(drawn, 48)
    real = rows.inputs[1]
    assert real is not None and not real.all() and not rows.learnt[~real].any()

    def gradient(*parts: slice) -> tuple[torch.Tensor, float, torch.Tensor]:
        gradients.zero()
        shared = [of_rows(drawn[p], 48) for p in parts]
        whole = torch.stack([part.counts(1) for part in shared]).sum(0)
        losses = [backward_batch(model, part, whole, 0.3, 1e-2, 1 / len(parts)) for part in shared]
        load = torch.stack([router.load for router in model.routers()])
        router_health.forget(model.routers())
        return gradients.flat.clone(), sum(float(x.main) for x in losses), load.clone()

    model.train()
    whole, halves = gradient(slice(0, 4)), gradient(slice(0, 2), slice(2, 4))
    torch.testing.assert_close(whole[0], halves[0], rtol=1e-4, atol=1e-6)
    assert whole[1] == pytest.approx(halves[1], abs=1e-5)
    assert whole[2][0].sum() == real.sum() * CONFIG.num_experts_per_tok
    results = loop.run(training)
    assert results["tokens"] == 1344, "steps count all tokens of their rows, padding included"


@pytest.mark.parametrize("policy", ["attention", "block"])
def test_recomputation_changes_no_bit_and_counts_no_token_twice(policy: Policy) -> None:
    tokens = torch.randint(0, 320, (4, 18), generator=torch.Generator().manual_seed(0))

    def run(chosen: Policy) -> tuple[Losses, list[torch.Tensor], list[torch.Tensor], int]:
        model, kept = use_recompute(toy_model().train(), chosen), 0

        def pack(t: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            losses = backward(model, tokens, 0.3, 1e-2)
        return losses, [p.grad for p in model.parameters()], [r.load for r in model.routers()], kept  # type: ignore[misc]

    plain, again = run("none"), run(policy)
    assert torch.equal(plain[0].main, again[0].main) and torch.equal(plain[0].balance, again[0].balance)
    assert all(map(torch.equal, plain[1], again[1])) and all(map(torch.equal, plain[2], again[2]))
    assert plain[2][0].sum() == 4 * 16 * CONFIG.num_experts_per_tok


def test_recomputation_by_block_keeps_less() -> None:
    config = dataclasses.replace(CONFIG, num_hidden_layers=6, num_nextn_predict_layers=0)
    tokens = torch.randint(0, 320, (8, 65), generator=torch.Generator().manual_seed(0))
    peaks = {}
    for policy in ("none", "attention", "block"):
        model, alive = use_recompute(Transformer(config).initialise(0).train(), policy), []  # type: ignore[arg-type]

        class Kept:
            def __init__(self, t: torch.Tensor, alive: list[int] = alive) -> None:
                self.t, self.alive = t, alive
                alive.append(t.numel())

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.t):
            hidden = model(tokens[:, :-1])
        peaks[policy] = sum(alive)
        hidden.sum().backward()
    assert peaks["block"] < peaks["attention"] < peaks["none"], peaks


def test_spikes_are_what_is_no_number_or_far_above_the_usual() -> None:
    spikes = Spikes(sigma=6.0, patience=2)
    assert spikes.judge(9.0, 1.0) == "learn" and spikes.judge(float("nan"), 1.0) == "skip"
    assert spikes.judge(1.0, math.inf) == "rewind" and spikes.judge(1.0, 1.0) == "learn"
    spikes = Spikes(sigma=6.0, patience=2)
    for i in range(ENOUGH):
        assert spikes.judge(2.0 + 0.1 * (-1) ** i, 1.0) == "learn"
    assert spikes.judge(2.5, 1.0) == "learn" and spikes.judge(4.0, 1.0) == "skip"
    copy = Spikes(6.0, 2)
    copy.load_state(spikes.state())
    assert copy.judge(4.0, 1.0) == spikes.judge(4.0, 1.0) == "rewind"
    assert Spikes(0.0, 2).judge(1e9, 1.0) == "learn"


def broken_at(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Gives the forward passes of these numbers an infinite loss, and so an infinite gradient."""
    count = iter(range(1, 10**6))

    def pass_(model: Transformer, batch: Batch, *arguments: Any) -> Losses:
        losses = training_losses(model, batch, *arguments)
        return dataclasses.replace(losses, main=losses.main * math.inf) if next(count) in calls else losses

    monkeypatch.setattr(trainer, "training_losses", pass_)


def test_a_step_that_is_no_number_is_skipped(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_at(monkeypatch, 7)
    training = begin(prepared, pretrain(name="skipped"))
    model, step = training.trainer.model, training.step
    before: dict[str, torch.Tensor] = {}

    def watched(at: loop.Loop) -> dict[str, Any]:
        if at.step == 7:
            before.update({n: t.clone() for n, t in model.state_dict().items()})
        metrics = step(at)
        if at.step == 7:
            assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
            assert all(not r.load.any() for r in model.routers()) and metrics["skipped"] == "skip"
        return metrics

    training.step = watched  # type: ignore[method-assign]
    results = loop.run(training)
    log = read_lines(prepared / "skipped" / "metrics.jsonl")
    assert results["skipped_steps"] == 1 and [r["step"] for r in log if "skipped" in r] == [7] and before


def test_three_in_a_row_go_back_to_the_checkpoint_and_on_with_other_data(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_at(monkeypatch, 7, 8, 9)
    results, log, folder = trained(prepared, "rewound")
    assert results["rewinds"] == 1 and results["tokens"] == 1280
    assert [r for r in log if "rewound_from" in r] == [{"step": 5, "tokens": 320, "rewound_from": 9}]
    steps = [r["step"] for r in log if "loss" in r]
    assert steps == list(range(1, 21)), "the steps after the checkpoint must be repeated"
    drawn = sum(results["tokens_by_source"].values())
    assert drawn == 1280 + 4 * 64, "the data in between are skipped"
    ledger = [r.get("tokens_trained", 0) for r in read_lines(folder / "ledger.jsonl")]
    assert sum(ledger) == drawn, "the ledger includes the rewound steps"


def test_a_run_that_only_rewinds_ends(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_at(monkeypatch, *range(7, 1000))
    with pytest.raises(UserError, match=r"lost\.muon_lr = .*3 steps in a row up to 8 .* after 5 rewinds"):
        loop.run(begin(prepared, pretrain(name="lost")))
    broken_at(monkeypatch, *range(1, 1000))
    with pytest.raises(UserError, match=r"early\.muon_lr = .*3 steps in a row up to 3 .* after 0 rewinds"):
        loop.run(begin(prepared, pretrain(name="early")))


@pytest.mark.parametrize("steps", [0, 6], ids=["plain", "anticipatory"])
def test_an_interrupted_run_ends_with_the_same_bits(
    steps: int, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything that a checkpoint saves: ramp, average, rewind, levels, validation, best model, choices."""
    names = f"whole-{steps}", f"parts-{steps}"
    knobs: dict[str, Any] = {
        "anticipatory_steps": steps,
        "anticipatory_delay": 2,
        "batch_size": 8,
        "batch_size_start": 2,
        "ramp_tokens": 640,
        "ema_decay": 0.9,
        "mtp_weight": ((0, 0.3), (640, 0.1)),
        "valid_tokens": 256,
        "keep_best": True,
        "recompute": "block",
        "checkpoint_steps": 3,
    }
    broken_at(monkeypatch, 8, 9, 10)
    _, whole, one = trained(prepared, names[0], **knobs)
    broken_at(monkeypatch, 8, 9, 10)
    stage = pretrain(name=names[1], **knobs)
    for stops in (2, 5, 4):  # number of steps before each interruption
        interrupted(begin(prepared, stage), stops, monkeypatch)
    loop.run(begin(prepared, stage))
    parts, other = read_lines(prepared / names[1] / "metrics.jsonl"), prepared / names[1]
    timed = ("seconds", "tokens_per_second", "mfu")

    def numbers(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if k not in timed} for r in log]

    assert numbers(parts) == numbers(whole) and any("rewound_from" in r for r in whole)
    for name in ("", "average", "best"):
        a, b = (store.load(folder / name / "model.safetensors")[0] for folder in (one, other))
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert read_lines(one / "router.jsonl") == read_lines(other / "router.jsonl")


def test_the_average_of_the_weights_by_hand() -> None:
    model = toy_model()
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    average = EMA(list(model.named_parameters()), 0.75)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    average.update()
    with average.swapped():
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), first[name] + 0.25)
    assert all(torch.equal(p, first[n] + 1.0) for n, p in model.named_parameters())


def test_the_average_and_the_best_are_inputs_of_later_stages(prepared: Path) -> None:
    _, log, _ = trained(prepared, "kept", ema_decay=0.5, valid_tokens=320, keep_best=True)
    assert [r["step"] for r in log if "bits_per_byte_words" in r] == [5, 10, 15, 20]
    run = StageRun(prepared, "next", 0, World(), quiet=True)
    for name in ("kept", "kept/average", "kept/best"):
        assert models.load(run.input(name)).config.vocab_size == 320
    assert run.input("kept/nothing") == Path("kept/nothing")
    text = Prepare(name="prepare", text=(Files((str(prepared / "words.txt"),), name="words"),))
    Recipe("r", (text, pretrain(name="kept"), pretrain(name="on", start="kept/average")))


def test_going_on_and_extending(prepared: Path) -> None:
    """The window grows, YaRN is applied once and stays, and the weights are the same."""
    trained(prepared, "short")
    window = CONFIG.max_position_embeddings
    knobs = {"start": "short", "window": 2 * window, "seq_len": 48, "batch_size": 2}
    training = begin(prepared, pretrain(Extend, name="long", factor=4.0, **knobs))
    scaling = Yarn(factor=4.0, original_max_position_embeddings=window)
    model = training.trainer.model
    assert model.config.rope_scaling == scaling and model.config.max_position_embeddings == 2 * window
    old = models.load(prepared / "short")
    assert all(torch.equal(t, old.state_dict()[n]) for n, t in model.state_dict().items())
    assert model.cos.size(0) == 2 * window and not torch.equal(model.cos[:window], old.cos)
    training.run.finish(loop.run(training))
    further = begin(prepared, pretrain(Extend, name="longer", **knobs | {"start": "long", "window": 4 * window}))
    assert further.config.rope_scaling == scaling
    for wrong, words in [
        ({"start": "long", "factor": 2.0}, "already has RoPE scaling"),
        ({"window": window // 2}, "reads 256 already"),
    ]:
        with pytest.raises(UserError, match=words):
            begin(prepared, pretrain(Extend, name="wrong", **knobs | wrong))
    on = begin(prepared, pretrain(name="on", start="short"))
    assert all(torch.equal(t, old.state_dict()[n]) for n, t in on.trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"model": None, "start": ""}, r"base\.model = None: say what to train"),
        ({"start": "x", "model": CONFIG}, r"base\.model"),
        ({"batch_size_start": 8, "ramp_tokens": 9}, r"base\.batch_size_start = 8"),
        ({"batch_size_start": 2}, r"base\.batch_size_start = 2"),
        ({"keep_best": True}, r"base\.keep_best"),
        ({"expert_kernel": "grouped_mm", "compute": "fp8"}, r"base\.expert_kernel = 'grouped_mm'"),
        ({"ema_decay": 1.5}, r"base\.ema_decay = 1\.5"),
        ({"keep": 0}, r"base\.keep = 0"),
        ({"spike_sigma": -1.0}, r"base\.spike_sigma"),
        ({"phases": ((1, 2),)}, r"base\.phases"),
        ({"muon_lr": float("nan")}, r"base\.muon_lr = nan"),
    ],
)
def test_impossible_knobs_are_named(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        pretrain(**knobs)


def test_another_tokenizer_is_refused(prepared: Path, tmp_path: Path) -> None:
    from finback.data import tokenizer

    (tmp_path / "other").mkdir()
    tokenizer.train([WORDS.upper()], 320, tmp_path / "other" / "tokenizer.json")
    models.save(tmp_path / "other", toy_model())
    with pytest.raises(UserError, match="does not have the tokenizer of the data"):
        begin(prepared, pretrain(name="foreign", start=str(tmp_path / "other")))


def test_ranks_must_divide_the_first_rows_too() -> None:
    assert pretrain(batch_size=8, batch_size_start=2, ramp_tokens=10).batch_size_at(0) == 2
    assert rates.ramp(5, 2, 8, 10) % 2 == 0


@pytest.mark.slow
def test_a_hundred_kills_leave_every_bit(prepared: Path) -> None:
    """Saves a checkpoint after every step, so that many kills come during a write."""
    command = [sys.executable, "-m", "tests.killed", str(prepared), "100", "0"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] == 100 and told["half_written"] > 0, told
    assert told["at"] == sorted(told["at"]) and told["at"][-1] >= 50, "a kill must not lose saved steps"
    a, b = (store.load(prepared / name / "model.safetensors")[0] for name in ("killed", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in b)
    logs = [read_lines(prepared / name / "metrics.jsonl") for name in ("killed", "whole")]
    timed = {"seconds", "tokens_per_second", "mfu"}
    one, other = ([{k: v for k, v in r.items() if k not in timed} for r in log] for log in logs)
    assert one == other


def test_an_open_checkpoint_is_gone_on_with_on_text_of_ones_own(prepared: Path, tmp_path: Path) -> None:
    """Exports a Hugging Face folder, prepares text with its tokenizer, imports it and continues training."""
    trained(prepared, "origin")
    outside = tmp_path / "open"
    export_model(prepared / "origin", outside, "fp32")
    text = Files((str(prepared / "words.txt"),), name="words")
    stage = Prepare(name="again", text=(text,), vocabulary=str(outside))
    Recipe("r", (stage, pretrain(name="on", start=str(outside), data="again")))
    run = StageRun(prepared, "again", 0, World(), quiet=True)
    run.folder.mkdir()
    run.finish(stage.run(run))
    assert (run.folder / "words.train.bin").read_bytes() == (prepared / "prepare/words.train.bin").read_bytes()
    training = begin(prepared, pretrain(name="gone-on", start=str(outside), data="again"))
    old = models.load(prepared / "origin")
    assert all(torch.equal(t, old.state_dict()[n]) for n, t in training.trainer.model.state_dict().items())
    assert loop.run(training)["tokens"] == 1280


def test_going_on_with_a_tied_model_trains_one_matrix(prepared: Path) -> None:
    """Head and embedding stay one parameter, which gets both gradients."""
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    trained(prepared, "tied", model=tied)
    model = begin(prepared, pretrain(name="tied_on", start="tied")).trainer.model
    assert model.head.weight is model.embed
    fresh = Transformer(model.config).train()
    fresh.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 320, (2, 18), generator=torch.Generator().manual_seed(0))
    for each in (model, fresh):
        each.zero_grad(set_to_none=True)
        backward(each, tokens)
    assert model.embed.grad is not None and fresh.embed.grad is not None
    torch.testing.assert_close(model.embed.grad, fresh.embed.grad)
