"""SFT, distillation and GRPO of a sharded model: the same steps as on one rank, with and without an adapter."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finback.checkpoint import models
from finback.config import UserError
from finback.model.lora import LoRA, adapter_parameters
from finback.parallel.layout import Layout
from finback.runs.files import read_lines
from finback.stages.grpo import GRPO
from finback.stages.sft import SFT
from finback.tasks.math import Chains
from tests.many import on_ranks
from tests.toy import DENSE, ROOT, V4, environment, finback_process
from tests.tuned import EXACT, SPREAD, STEPWISE, alone, begun, on_layout, prepared, stopped_at, weights

FAST = ("sft", "lora grpo")
WHOLE = ("sft", "grpo")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("tuned") / "runs")


def test_stages_learn_on_two_ranks_as_on_one(root: Path) -> None:
    """Rows, experts and tokens of rows are split over both; in the last step one rank has fewer rows than parts."""
    alone(root, FAST, 2)
    on_ranks(2, on_layout, str(root), FAST, Layout(cp=2, ep=2), 2)


def test_ranks_with_whole_models_learn_as_one(root: Path) -> None:
    """ZeRO-1: each rank generates with the model that it trains; the reference model is sharded, and refreshed once.
    Gradients are summed in buckets while the last pass runs."""
    alone(root, WHOLE, 3)
    on_ranks(2, on_layout, str(root), WHOLE, Layout(dp=2, sharding="zero1", bucket_mb=0.01), 3)


LAYOUTS = {
    "data": Layout(dp=2),
    "experts": Layout(dp=4, ep=2),
    "context": Layout(cp=4),
    "all": Layout(dp=2, cp=2, ep=4),
    # on CPUs offloading moves nothing, and must change no number
    "host": Layout(dp=2, ep=2, offload=True),
}


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of ten steps of everything on one rank."""
    root = prepared(tmp_path_factory.mktemp("ten") / "runs")
    alone(root, STEPWISE, 10)
    return root


ZERO = {
    "whole": Layout(dp=2, sharding="zero1"),
    "experts": Layout(dp=4, ep=2, sharding="zero1"),
    "all": Layout(dp=2, cp=2, ep=2, sharding="zero1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ZERO)
def test_ten_steps_of_all_weights_are_those_of_one_rank_under_zero1(layout: str, ten: Path) -> None:
    names = tuple(name for name in STEPWISE if "lora" not in name and "dora" not in name)
    on_ranks(ZERO[layout].ranks, on_layout, str(ten), names, ZERO[layout], 10)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_are_those_of_one_rank_under_every_layout(layout: str, ten: Path) -> None:
    on_ranks(LAYOUTS[layout].ranks, on_layout, str(ten), STEPWISE, LAYOUTS[layout], 10)


_GROUPED = replace(DENSE, initializer_range=0.15)
_EXPERTS: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 0}
_SLIDES: dict[str, Any] = {"sliding_window": 6, "layer_types": ("sliding_attention", "full_attention")}
_GEMMA: dict[str, Any] = {"norms": "both", "norm_offset": True, "scale_embeddings": True, "activation": "gelu_tanh"}
SHAPES = {
    "gemma3_text": replace(
        _GROUPED, **_GEMMA, **_SLIDES, qk_norm=True, query_pre_attn_scalar=24, local_rope_theta=300.0
    ),
    "mixtral": replace(_GROUPED, **_EXPERTS, n_shared_experts=0, scoring_func="softmax"),
    "qwen3_moe": replace(_GROUPED, **_EXPERTS, n_shared_experts=0, scoring_func="softmax", qk_norm=True),
    # a key bias without rotation changes no score: its gradient is rounding noise, which Adam turns into steps
    "glm4_moe": replace(_GROUPED, **_EXPERTS, partial_rotary_factor=0.5),
    "gpt_oss": replace(
        _GROUPED,
        **{**_EXPERTS, **_SLIDES, "n_shared_experts": 0, "scoring_func": "softmax", "attention_bias": "all"},
        attention_sinks=True,
        swiglu_alpha=1.702,
        swiglu_limit=0.5,
    ),
    "smollm3": replace(_GROUPED, nope_layers=(1,), tie_word_embeddings=True),
    "deepseek_v32": replace(SPREAD, index_topk=6, index_n_heads=16, index_head_dim=8),
    "glm_moe_dsa": replace(
        SPREAD, num_hidden_layers=3, index_topk=6, index_n_heads=16, index_head_dim=8, shared_indexers=(1,)
    ),
    "deepseek_v4": replace(V4, vocab_size=320, max_position_embeddings=256, swiglu_limit=10.0),
    "olmo3": replace(_GROUPED, **_SLIDES, norms="post", qk_norm=True, qk_norm_over="projection"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
def test_every_family_learns_on_two_ranks_as_on_one(family: str, tmp_path: Path) -> None:
    """SFT, and RL of an adapter; some also on a quantized base whose fp32 parts stay fp32, and RL that replays the
    entries that indexers select."""
    root = prepared(tmp_path / "runs", SHAPES[family])
    is_sparse = SHAPES[family].index_topk > 0
    names = (*FAST, "qlora sft") if is_sparse or family == "gpt_oss" else FAST
    names += ("grpo indexed",) if is_sparse else ()
    alone(root, names, 2)
    layout = Layout(cp=2, ep=2) if SHAPES[family].n_routed_experts else Layout(cp=2)
    on_ranks(2, on_layout, str(root), names, layout, 2)


@pytest.mark.slow
def test_rows_cut_into_micro_batches_are_those_of_one_pass(ten: Path) -> None:
    names = tuple(name for name in STEPWISE if "grpo" not in name)
    on_ranks(2, on_layout, str(ten), names, Layout(dp=2, ep=2, micro_batches=2), 10)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"layout": Layout(pp=2)}, r"tuned\.layout\.pp = 2: is supported in pre-training only\. Use dp, cp and ep"),
        (
            {"layout": Layout(dp=2, sharding="ddp")},
            r"tuned\.layout\.sharding = 'ddp': can be planned, .* Use \"zero1\"",
        ),
        (
            {"layout": Layout(dp=2, sharding="zero1"), "adapter": LoRA()},
            r"tuned\.layout\.sharding = 'zero1': would hold an adapter's base whole on every rank\. Use \"fsdp\"",
        ),
        (
            {"layout": Layout(dp=2, gather="bf16"), "adapter": LoRA(base="nf4")},
            r"tuned\.layout\.gather = 'bf16': nf4 is gathered as it is stored\. Leave it out\.",
        ),
    ],
)
def test_what_a_layout_does_not_do_here_is_refused(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SFT(name="tuned", start="base", **knobs)
    with pytest.raises(UserError, match=words):
        GRPO(name="tuned", start="base", task=Chains(), **knobs)


def test_rl_cuts_answers_by_tokens() -> None:
    with pytest.raises(UserError, match=r"rl\.layout\.micro_batches = 2: answers are split by micro_tokens"):
        GRPO(name="rl", start="base", task=Chains(), layout=Layout(dp=2, micro_batches=2))


def _continued(root: str, name: str, layouts: list[Layout | None], stops: list[int]) -> None:
    """Runs a stage under each layout in turn up to a step; the last one runs to the end and writes its model."""
    for layout, stop in zip(layouts, stops, strict=True):
        training = begun(Path(root), name, layout, "moved")
        looped = training.loop()
        state = looped.restore()
        if state is not None:
            training.load_state(state)
        while looped.step < stop:
            training.run.log(looped.step + 1, **looped.advance())
        looped.checkpoint()
        training.trainer.settle()
    training.trainer.export(training.run, training.run.folder, training.tokenizer)
    if "lora" in name:  # read by ranks with a part of the experts each
        (training.run.folder / "manifest.json").write_text("{}")
        training.run.ranks.barrier()
        expected = torch.load(Path(root) / f"{name}.pt", weights_only=False).weights
        found = weights(begun(Path(root), "lora on lora", Layout(cp=2, ep=2)).trainer)
        assert all((found[n] - tensor).abs().max() <= 1e-5 for n, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "grpo", "lora grpo", "qlora sft"])
def test_a_checkpoint_goes_on_under_another_layout(name: str, tmp_path: Path) -> None:
    """After layouts with expert parallelism, split rows and whole copies: one rank's numbers and model files."""
    root = prepared(tmp_path / "runs")
    alone(root, (name,), 6)
    second = Layout(cp=2) if "lora" in name else Layout(dp=2, sharding="zero1")
    on_ranks(2, _continued, str(root), name, [Layout(dp=2, ep=2), second, None, Layout(cp=2, ep=2)], [2, 3, 4, 6])
    expected = torch.load(root / f"{name}.pt", weights_only=False)
    log = read_lines(root / "moved/metrics.jsonl")
    for line, one in zip(log, expected.metrics, strict=True):
        assert (line["loss"], line["grad_norm"]) == pytest.approx((one["loss"], one["grad_norm"]), abs=1e-5)
    if "lora" in name:
        model = models.load_for_training(root / "moved", EXACT, torch.float32, 0)
        found = {n: p.detach() for n, p in adapter_parameters(model)}
    else:
        found = models.load(root / "moved").state_dict()
    assert all((found[n] - tensor).abs().max() <= 1e-5 for n, tensor in expected.weights.items())


def _interrupted(root: str, names: tuple[str, ...], layout: Layout) -> None:
    """Five steps at once, and five steps with the fourth repeated, give the same bits."""
    for name in names:
        ends = []
        for way, stops in (("once", (5,)), ("twice", (3, 5))):
            for stop in stops:
                training = begun(Path(root), name, layout, f"{name} {way} {layout.sharding}".replace(" ", "_"))
                looped = stopped_at(training.loop(), stop)
                training.trainer.settle()
                if stop == 3:
                    looped.advance()
            ends.append(weights(training.trainer))
        assert all(torch.equal(ends[1][n], tensor) for n, tensor in ends[0].items()), name


@pytest.mark.slow
def test_an_interrupted_stage_ends_with_the_same_bits(tmp_path: Path) -> None:
    root, names = prepared(tmp_path / "runs"), ("sft", "sft on the host", "grpo", "lora grpo")
    alone(root, names[2:], 5)
    on_ranks(2, _interrupted, str(root), names, Layout(dp=2, ep=2))
    on_ranks(2, _interrupted, str(root), names[:3], Layout(dp=2, sharding="zero1"))


RECIPE = """
from finback.parallel.layout import Layout
from finback.stages.grpo import GRPO
from finback.stages.prepare import TaskText
from finback.stages.sft import SFT
from finback.stages.validation import Validation
from finback.tasks.math import Chains
from finback.train.grpo_loss import Objective

task, layout = Chains(2, 3), Layout(dp=2, ep=2)
recipe = [
    SFT(name="taught", start=BASE, text=(TaskText(name="sums", tasks=(task,), documents=60, think=0.0),), batch_size=3,
        seq_len=64, epochs=1, lr=1e-3, checkpoint_steps=2, layout=layout),
    GRPO(name="rl", start="taught", task=task, steps=6, prompts_per_step=4, num_generations=4, max_tokens=8, lr=1e-4,
         patience=0, checkpoint_steps=1, objective=Objective(beta=0.01), reference_steps=2, layout=layout,
         validation=Validation(task=task, problems=6, every_steps=3, max_tokens=6)),
]
"""


@pytest.mark.slow
def test_a_killed_road_on_a_layout_ends_with_the_same_bits(tmp_path: Path) -> None:
    root = prepared(tmp_path / "given")
    (tmp_path / "road.py").write_text(RECIPE.replace("BASE", repr(str(root / "base"))))
    commands = [
        [sys.executable, "-m", "finback", "run", str(tmp_path / "road.py"), "--runs", str(tmp_path / n), "--ranks", "2"]
        for n in ("whole", "killed")
    ]
    done = subprocess.run(commands[0], env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rng, kills = random.Random(0), 0
    for stage, steps in (("taught", 2), ("rl", 1), ("rl", 3), ("rl", 5)):
        child = subprocess.Popen(
            commands[1], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        log = tmp_path / "killed/road" / stage / "metrics.jsonl"
        while child.poll() is None and (not log.is_file() or len(log.read_bytes().splitlines()) < steps):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        kills += child.poll() is None
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        time.sleep(1)
    done = subprocess.run(commands[1], env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and kills >= 3, done.stderr
    for stage in ("taught", "rl"):
        ours, theirs = (models.load(tmp_path / n / "road" / stage).state_dict() for n in ("killed", "whole"))
        assert all(torch.equal(ours[n], tensor) for n, tensor in theirs.items()), stage
        losses = [
            [r["loss"] for r in read_lines(tmp_path / n / "road" / stage / "metrics.jsonl") if "loss" in r]
            for n in ("killed", "whole")
        ]
        assert losses[0] == losses[1]


EVEN = """
from dataclasses import dataclass
from finback.tasks import math
from finback.tasks.task import Verdict

@dataclass(frozen=True)
class Even(math.Chains):
    def check(self, problem, text):
        return Verdict(len(text) % 2 == 0, True)
"""


@pytest.mark.slow
def test_live_answers_are_one_ranks_under_every_layout(tmp_path: Path) -> None:
    """SFT, then six steps of RL on its own answers: the same answers, with one line each in samples.jsonl.

    If all rewards are equal, gradients are rounding noise, which the optimizer scales up: therefore half of these
    answers are right.
    """
    root, found = prepared(tmp_path / "given"), {}
    for ranks, layout in (1, "None"), (2, "Layout(dp=2)"), (2, "Layout(dp=2, ep=2)"), (4, "Layout(dp=2, cp=2, ep=4)"):
        recipe, text = tmp_path / f"road{len(found)}.py", RECIPE.replace("BASE", repr(str(root / "base")))
        text = text.replace("Layout(dp=2, ep=2)", layout).replace("Chains(2, 3)", "Even(2, 3)")
        recipe.write_text(
            EVEN + text.replace("epochs=1, lr=1e-3", "epochs=8, lr=3e-3")
        )  # long enough for some answers to end
        done = finback_process("run", recipe, "--runs", tmp_path, "--ranks", ranks)
        assert done.returncode == 0, done.stderr
        lines = read_lines(tmp_path / recipe.stem / "rl/samples.jsonl")
        # the prompts of a rank are consecutive
        found[layout] = sorted((r["step"], r["question"], r["thinking"], r["answer"], r["tokens"]) for r in lines)
        assert 0 < sum(r["correct"] for r in lines) < len(lines) == 96
    for layout, answers in found.items():
        assert answers == found["None"], layout


@pytest.mark.slow
def test_experts_on_two_ranks_are_taught_by_their_recipe(tmp_path: Path) -> None:
    less = ("base.max_tokens=20000", "base.decay_tokens=4000", "base.warmup_tokens=2000", "rl.steps=2", "rl.patience=0")
    settings = [word for text in less for word in ("--set", text)]
    done = finback_process("run", ROOT / "recipes/moe_rl.py", "--runs", tmp_path, "--ranks", 2, *settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "moe_rl/rl/model.safetensors.index.json").is_file() and "sums" in done.stdout
    assert all(
        line["sync_bytes"] > 0 for line in read_lines(tmp_path / "moe_rl/rl/metrics.jsonl") if "sync_bytes" in line
    )
