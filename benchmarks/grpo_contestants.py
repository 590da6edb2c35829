"""The contestants of the GRPO benchmark, and the work of their processes."""

import dataclasses
import random
import time
import zlib
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import qualify
from driver import CORES, Contestant, Settings
from twin import count, twin

from finback.checkpoint import models
from finback.data.messages import encode_prompt
from finback.data.tokenizer import BOS, EOS, PAD, Tokenizer
from finback.data.turn import Message
from finback.engine.engine import Engine
from finback.model.config import TINY
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.rollouts.rollouts import Rollout
from finback.runs.folder import StageRun
from finback.stages.grpo import GRPO
from finback.stages.grpo_sampling import Group, GroupSampler
from finback.stages.grpo_training import Reinforcement
from finback.tasks import task as tasks
from finback.tasks.math import Chains

CHAINS = Chains(min_terms=4, max_terms=6)
LR = 1e-6  # TRL's default: small enough for answers to keep their lengths
STEPS = 64  # questions drawn for TRL's data set; it repeats after this many steps


def reward(answer: Sequence[int]) -> float:
    """0 to 1, a hash of an answer's ids: cheap, and different within every group."""
    return zlib.crc32(str(list(answer)).encode()) % 1000 / 1000


def save_base(folder: Path, tokenizer: Path) -> None:
    """A model to start from, with random weights."""
    folder.mkdir()
    words = Tokenizer(tokenizer)
    config = dataclasses.replace(TINY, num_nextn_predict_layers=0, vocab_size=words.vocab_size)
    models.save(folder, Transformer(config).initialise(0))
    words.save(folder)


def prompts(settings: Settings, step: int) -> list[tuple[list[int], str]]:
    """The questions of one step, those that the stage draws: as ids, and as the text that encodes to them."""
    tokenizer = Tokenizer(Path(settings["base"]) / "tokenizer.json")
    rng = random.Random(_stage_run(settings, World()).seed("questions", step))
    drawn = [tasks.draw(CHAINS, "train", rng) for _ in range(settings["prompts"])]
    ids = [encode_prompt([Message("user", p.question)], tokenizer)[0] for p in drawn]
    return [(i, tokenizer.decode(i, skip_special=False)) for i in ids]


def _stage_run(settings: Settings, world: World) -> StageRun:
    run = StageRun(Path(settings["folder"]), "zero", 0, world, quiet=True)
    run.folder.mkdir(exist_ok=True)  # every answer is written there
    return run


class _HashRewarded(GroupSampler):
    """The stage's own sampling with the benchmark's reward."""

    rollout_seconds = 0.0

    def sample(self, step: int) -> tuple[list[Group], list[Group]]:
        begin = time.perf_counter()
        found = super().sample(step)
        self.rollout_seconds += time.perf_counter() - begin
        return found

    def rewarded(self, group: list[Rollout]) -> list[dict[str, float]]:
        return [{"accuracy": reward(r.completion.tokens), "form": 0.0} for r in group]


def finback_worker(pipe: Connection, settings: Settings) -> None:
    """The GRPO stage's own step."""
    world = World.join(settings["rank"], settings["ranks"])
    stage = GRPO(
        name="zero",
        start=settings["base"],
        task=CHAINS,
        prompts_per_step=settings["prompts"],
        num_generations=settings["group"],
        lr=LR,
        max_tokens=settings["tokens"],
        compute=settings["precision"],
        share_prompts=settings["share_prompts"],
        max_gap=1.0,
        patience=0,
    )
    run = _stage_run(settings, world)
    training = Reinforcement(stage, run)
    engine = Engine(training.model, stops=()) if settings["fixed"] else training.rollouts
    training.sampler = sampler = _HashRewarded(stage, run, engine, training.tokenizer)
    loop = training.loop()

    def step() -> dict[str, float]:
        metrics = loop.advance()
        training.after(loop, metrics)
        return metrics

    begin = time.perf_counter()
    step()
    pipe.send({"parameters": count(training.model), "warm_step_seconds": time.perf_counter() - begin})
    while True:
        sampler.rollout_seconds = 0.0
        metrics = [step() for _ in range(pipe.recv())][-1]
        pipe.send(
            {
                "rollout_seconds": sampler.rollout_seconds,
                "mean_length": metrics["length"],
                "groups_with_gradient": metrics["groups_with_gradient"],
                "grad_norm": metrics["grad_norm"],
                "trainer_engine_gap": metrics["gap_mean"],
            }
        )


def trl_worker(pipe: Connection, settings: Settings) -> None:
    """GRPOTrainer, whose loop waits between turns."""
    import datasets  # here, so that finback's processes need not load them
    import transformers
    from trl import GRPOTrainer

    class Timed(GRPOTrainer):
        rollout_seconds = 0.0

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            begin = time.perf_counter()
            outputs = super()._generate_and_score_completions(inputs)
            self.rollout_seconds += time.perf_counter() - begin
            return outputs

    class Turns(transformers.TrainerCallback):
        """Waits for the driver before a step and answers after the last one asked for; the first step warms up."""

        left, begun = 1, 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if self.left == 0:
                self.left = pipe.recv()
                trainer.rollout_seconds = 0.0
            self.begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            self.left -= 1
            if self.left == 0:
                pipe.send(self.first() if state.global_step == 1 else self.later())

        def first(self) -> dict[str, float]:
            return {"parameters": count(trainer.model), "warm_step_seconds": time.perf_counter() - self.begun}

        def later(self) -> dict[str, float]:
            seen = trainer._metrics["train"]
            return {
                "rollout_seconds": trainer.rollout_seconds,
                "mean_length": seen["completions/mean_length"][-1],
                "groups_with_gradient": 1 - seen["frac_reward_zero_std"][-1],
            }

    tokenizer, model = _trl_model(settings)
    steps = [prompts(settings, step) for step in range(1, STEPS + 1)]
    for ids, text in steps[0]:
        assert tokenizer(text)["input_ids"] == ids, f"{text!r} is not read as finback reads it"
    trainer = Timed(
        model=model,
        reward_funcs=_trl_reward,
        args=_trl_arguments(settings),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"prompt": [text for step in steps for _, text in step]}),
    )
    trainer.add_callback(Turns())
    trainer.train()


def _trl_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [reward(ids) for ids in completion_ids]


def _trl_model(settings: Settings) -> tuple[Any, Any]:
    """Tokenizer and model. For answers of full length the end-of-sequence id lies beyond the model's vocabulary."""
    import transformers

    base = Path(settings["base"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(base / "tokenizer.json"),
        bos_token=BOS,
        pad_token=PAD,
        padding_side="left",
        eos_token="<never>" if settings["fixed"] else EOS,
    )
    ours = models.load(base)
    assert (tokenizer.eos_token_id >= ours.config.vocab_size) == settings["fixed"], "who can end an answer"
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return tokenizer, twin(ours, **special)


def _trl_arguments(settings: Settings) -> Any:
    from trl import GRPOConfig

    answers = settings["prompts"] * settings["group"] // settings["ranks"]
    parts = settings["parts"]
    return GRPOConfig(
        output_dir=f"{settings['folder']}/trl",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_steps=1_000_000,
        shuffle_dataset=False,
        per_device_train_batch_size=answers // parts,
        gradient_accumulation_steps=parts,
        num_generations=settings["group"],
        max_completion_length=settings["tokens"],
        temperature=1.0,
        beta=0.0,
        num_iterations=1,
        epsilon=0.2,
        loss_type="dapo",
        scale_rewards="group",
        learning_rate=LR,
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=settings["precision"] == "bf16",
        gradient_checkpointing=settings["checkpointing"],
        use_transformers_continuous_batching=settings["generation"] == "continuous batching",
        cache_implementation="static" if settings["generation"] == "static cache" else None,
    )


def finback_contestants(common: Settings) -> list[Contestant]:
    """One-thread ranks and one process with all threads, in either precision; fp32 ranks are the default.

    Ranks also with prompts that the update reads once per group.
    """
    found = []
    for precision in ("fp32", "bf16"):
        settings = common | {"precision": precision, "share_prompts": False}
        for ranks, threads in dict.fromkeys([(CORES, 1), (1, CORES)]):
            found.append(Contestant(f"finback {precision} {ranks}x{threads}", finback_worker, settings, ranks, threads))
        name, shared = f"finback {precision} shared prompts {CORES}x1", settings | {"share_prompts": True}
        found.append(Contestant(name, finback_worker, shared, CORES, 1))
    return found


def trl_alone(common: Settings) -> list[Contestant]:
    """TRL in one process. Its defaults save memory, which is plentiful here; the other settings aim at speed."""
    plain = {"precision": "fp32", "generation": "default", "parts": 1, "checkpointing": False}
    changes: dict[str, Settings] = {
        "defaults": {"precision": "bf16", "checkpointing": True},
        "fp32": {},
        "fp32 in 4 parts": {"parts": 4},
        "bf16": {"precision": "bf16"},
        "fp32 static cache": {"generation": "static cache"},
        "fp32 continuous batching": {"generation": "continuous batching"},
    }
    return [
        Contestant(f"trl {name} 1x{CORES}", trl_worker, common | plain | change, 1, CORES)
        for name, change in changes.items()
    ]


def trl_ranked(common: Settings, alone: Sequence[Contestant]) -> list[Contestant]:
    """The best setting once more as one-thread ranks, in fp32 and in whatever precision was best."""
    found: dict[str, Contestant] = {}
    for group in (alone, [c for c in alone if c.settings["precision"] == "fp32"]):
        champion = qualify.best(group)
        if champion and CORES > 1:
            name = f"{champion.name.rsplit(' ', 1)[0]} {CORES}x1"
            found[name] = Contestant(name, trl_worker, champion.settings, CORES, 1)
    return list(found.values())
