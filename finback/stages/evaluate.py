"""Evaluates a model on tasks: scores with their uncertainty, and statistics of the answers."""

import re
from dataclasses import InitVar, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from finback.checkpoint.inference import InferenceDtype
from finback.config import UserError, check_fields, check_not_negative, check_positive, did_you_mean
from finback.data.tokenizer import Tokenizer
from finback.engine.engine import Engine
from finback.engine.open import load
from finback.engine.request import SamplingParams
from finback.model.count import forward_flops_of
from finback.model.logprobs import text_logprobs
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.rollouts.drawing import Window
from finback.rollouts.rollouts import record, rollout
from finback.runs.declaration import Declaration
from finback.runs.files import read_lines, read_object, write_json, write_lines
from finback.runs.folder import Interrupted, StageRun
from finback.runs.recipe import Stage, Work
from finback.stages.compress import bits_by_source
from finback.stages.draft_acceptance import mtp_acceptance
from finback.suites import catalogue, compression
from finback.suites.statistics import interval, paired
from finback.suites.suite import Suite
from finback.tasks import task as tasks
from finback.tasks.language import consistency, known
from finback.tasks.task import Problem, Task


@dataclass(frozen=True)
class OfSuite:
    """Questions of a suite, asked and judged as in `finback compare`."""

    # the suite as written for --tasks, such as gym:chain_sum?level=easy
    spec: str

    def __post_init__(self) -> None:
        check_fields(self, "suite")
        catalogue.check(self.spec)

    @property
    def name(self) -> str:
        """The suite as the recipe names it."""
        return self.spec

    def content_files(self) -> dict[str, list[Path]]:
        """The question files that a field names; packaged suites have none."""
        name = self.spec.partition("?")[0]
        found = [path for path in map(Path, (name, name.partition("@")[0])) if path.is_file()]
        return {"spec": found[:1]}


@dataclass(frozen=True)
class Exam:
    """Asks `problems` distinct held-out problems of a task, once each. `think` opens the chain for the model.

    `suite` replaces the task: at most `problems` of its questions are asked, such as suite="gym:chain_sum".
    """

    # names the exam's file and its row in tables
    name: str
    # the task whose held-out problems are asked
    task: Task | OfSuite | None = None
    # number of problems
    problems: int = 600
    # sampling temperature; 0: greedy
    temperature: float = 1.0
    # start each answer inside the chain of thought
    think: bool = False
    # longest answer in tokens, chain included
    max_tokens: int = 96
    # ISO 639-1 code: also report the share of the chains' words in this language (R1 2.3.2)
    language: str = ""
    # a suite instead of a task
    suite: InitVar[str] = ""

    def __post_init__(self, suite: str) -> None:
        if (self.task is None) == (not suite):
            raise UserError(
                f"exam {self.name}", suite, "task and suite are both given, or neither is", "Give one of them."
            )
        if suite:
            object.__setattr__(self, "task", OfSuite(suite))
        check_fields(self, "exam")
        taken = "config", "manifest", "metrics", "ledger", "samples"  # the name becomes a file name
        if not re.fullmatch(r"\w[\w .-]*", self.name) or self.name in taken:
            raise UserError(
                "exam.name", self.name, "not usable as a file name", "Use letters, digits, spaces, . and -."
            )
        check_positive(self, f"exam {self.name}", "problems", "max_tokens")
        check_not_negative(self, f"exam {self.name}", "temperature")
        if self.language:
            known(self.language, f"exam {self.name}.language")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Gives a model its exams. Writes every answer to <exam>.jsonl."""

    # a stage, a run, a Hugging Face folder or a .gguf file
    start: str
    # exams with distinct names
    exams: tuple[Exam, ...]
    # a prepare stage; its validation text is compressed, for bits per byte
    data: str = ""
    # sources of that stage to compress
    sources: tuple[str, ...] = field(default_factory=tuple)
    # precision of the weights: "bf16" halves the memory; "auto" uses bf16 if the machine computes in it and the model is not small
    dtype: InferenceDtype = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [exam.name for exam in self.exams]
        if not names or len(set(names)) < len(names):
            raise UserError(f"{self.name}.exams", names, "needs at least one exam, with distinct names", "Name them.")

    def inputs(self) -> tuple[str, ...]:
        return (*super().inputs(), self.data) if self.data else super().inputs()

    def work(self) -> Work:
        return Work(tokens_generated=sum(e.problems * e.max_tokens for e in self.exams))

    def declaration(self) -> Declaration:
        return Declaration(
            "evaluation",
            ledger=("tokens_generated", "flops", "flops_evaluation"),
            results=("model", "evaluations", "bits_per_byte") if self.data else ("model", "evaluations"),
        )

    def run(self, run: StageRun) -> dict[str, Any]:
        world = World.of(run)
        model, tokenizer = load(run.input(self.start), self.dtype)
        model = model.to(world.device)
        self._check_sources(run)
        results: dict[str, Any] = {"model": self.start, "evaluations": []}
        for exam in self.exams:
            results["evaluations"].append(self._take(exam, run, world, model, tokenizer))
            if run.check_stop():
                raise Interrupted
        if self.data:
            results["bits_per_byte"], flops = bits_by_source(
                partial(text_logprobs, model), model.config, run.input(self.data), self.sources, world
            )
            run.account(flops_evaluation=flops)
        return results

    def _check_sources(self, run: StageRun) -> None:
        for source in self.sources:
            if not (run.input(self.data) / f"{source}.valid.bin").is_file():
                made = [p.name.removesuffix(".valid.bin") for p in run.input(self.data).glob("*.valid.bin")]
                raise UserError(f"{self.name}.sources", source, "not a prepared source", did_you_mean(source, made))

    def _take(
        self, exam: Exam, run: StageRun, world: World, model: Transformer, tokenizer: Tokenizer
    ) -> dict[str, Any]:
        """Scores one exam and writes <exam>.json, so that an interrupted evaluation does not repeat it."""
        path = run.folder / f"{exam.name}.json"
        if path.is_file():
            return read_object(path)
        assert exam.task is not None, "an exam has a task or a suite"
        task, drawn, suite = questions(exam, run.seed("exam", exam.task.name))
        window = Window(tokenizer, model.config, exam.max_tokens, exam.think)
        problems = window.fitting(drawn)
        too_long = len(drawn) - len(problems)
        mine = range(world.rank, len(problems), world.size)
        seeds = [run.seed("exam answer", exam.name, i) for i in mine]
        sampling = SamplingParams(exam.temperature, exam.max_tokens)
        engine = Engine(model, tokenizer.stops)
        answered = rollout(engine, tokenizer, task, [problems[i] for i in mine], seeds, sampling, exam.think)
        accepted = mtp_acceptance(model, answered)
        lengths = [r.length for r in answered]
        flops = forward_flops_of(model.config, lengths)
        if accepted[1]:  # measuring drafts took one more pass over all answers
            flops += forward_flops_of(model.config, lengths, mtp=True)
        gathered = world.gather((list(zip(mine, map(record, answered), strict=True)), accepted, flops))
        records = [found for _, found in sorted(pair for rank in gathered for pair in rank[0])]
        result = {"exam": exam.name, "task": exam.task.name, "temperature": exam.temperature, **scores(records)}
        if too_long:
            result["too_long"] = too_long
            run.say(f"{self.name:10} {exam.name}: {window.remark(too_long)}")
        if suite:
            result["suite"] = {"source": suite.source.name, "digest": suite.source.digest, "chance": suite.chance}
        if language := exam.language or (suite.language if suite else ""):
            result["language"] = language_of(records, language)
        drafts = sum(g[1][1] for g in gathered)
        if drafts:
            result["mtp_acceptance"] = sum(g[1][0] for g in gathered) / drafts
        if parent := self._parent(exam, run):
            before = [float(r["correct"]) for r in read_lines(run.root / parent[1] / f"{exam.name}.jsonl")]
            result["before"] = compared(parent[0], before, [float(r["correct"]) for r in records])
        generated = sum(r["tokens"] for r in records)
        flops = sum(g[2] for g in gathered)
        run.account(tokens_generated=generated, flops=flops, flops_evaluation=flops)
        world.barrier()  # every rank has checked for the file before it is written
        if run.is_writer:
            write_lines(run.folder / f"{exam.name}.jsonl", records)
            write_json(path, result)
        low, high = result["interval"]
        run.say(f"{self.name:10} {exam.name}: {result['accuracy']:.1%} ({low:.1%} to {high:.1%}), n = {result['n']}")
        if result.get("before", {}).get("worse"):
            run.say(f"{self.name:10} warning: {_loss(self.start, result)}")
        return result

    def _parent(self, exam: Exam, run: StageRun) -> tuple[str, str] | None:
        """The stage that trained `start`, and an earlier stage that gave the model before it the same exam; None if there is none."""
        trained = next((stage for stage in run.stages if stage.name == self.start), None)
        parent = getattr(trained, "start", "")
        for stage in run.stages:
            took = isinstance(stage, Evaluate) and stage.start == parent and exam in stage.exams
            if took and (run.root / stage.name / f"{exam.name}.jsonl").is_file():
                return parent, stage.name
        return None

    def describe(self, results: dict[str, Any]) -> str:
        return "\n".join(
            _loss(self.start, result) for result in results["evaluations"] if result.get("before", {}).get("worse")
        )


def questions(exam: Exam, seed: int) -> tuple[Task, list[Problem], Suite | None]:
    """The task that judges, the problems as user turns, and the suite if there is one."""
    if not isinstance(exam.task, OfSuite):
        assert exam.task is not None, "an exam has a task or a suite"
        return exam.task, tasks.distinct(exam.task, "held_out", exam.problems, seed), None
    suite = catalogue.load(exam.task.spec, exam.problems, seed)
    if suite.metric == compression.METRIC:
        remedy = "Name `data` and `sources` of the stage, for bits per byte."
        raise UserError(f"exam {exam.name}.suite", exam.task.spec, "has no questions", remedy)
    if suite.continuations:
        remedy = "Leave out score, or use `finback compare` on the stage."
        raise UserError(
            f"exam {exam.name}.suite", exam.task.spec, "is scored by likelihood, and an exam generates", remedy
        )
    assert not suite.system, "an exam has no system prompt"
    put = [replace(problem, question=suite.ask(problem)[-1]["content"]) for problem in suite.problems]
    return suite.task, put, suite


def compared(model: str, before: list[float], after: list[float]) -> dict[str, Any]:
    """Compares scores with those of the model that training started from, paired by problem."""
    difference = paired(after, before, seed=0)
    gained = {"difference": difference.mean, "interval": (difference.low, difference.high)}
    return {"model": model, "accuracy": sum(before) / len(before), **gained, "worse": difference.high < 0}


def _loss(model: str, result: dict[str, Any]) -> str:
    before, (low, high) = result["before"], result["before"]["interval"]
    return (
        f"Training made {model!r} worse than {before['model']!r} on {result['exam']}: {before['accuracy']:.1%} before, "
        f"{result['accuracy']:.1%} after ({100 * low:+.1f} to {100 * high:+.1f} points)."
    )


def scores(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy with its interval, length, truncation, and accuracy with and without a chain."""
    n = len(records)
    right = sum(r["correct"] for r in records)
    groups = {key: [r["correct"] for r in records if r["thinks"] == key] for key in (True, False)}
    return {
        "n": n,
        "accuracy": right / n,
        "interval": interval([float(r["correct"]) for r in records]),
        "mean_tokens": sum(r["tokens"] for r in records) / n,
        "truncated": sum(r["finish"] == "length" for r in records) / n,
        "thinks": len(groups[True]) / n,
        "accuracy_thinking": sum(groups[True]) / len(groups[True]) if groups[True] else None,
        "accuracy_guessing": sum(groups[False]) / len(groups[False]) if groups[False] else None,
    }


def language_of(records: list[dict[str, Any]], target: str) -> float | None:
    """Mean share of the chains' words in the target language; None if no chain has words."""
    shares = [consistency(r["thinking"], target) for r in records if r["thinks"]]
    known_shares = [share for share in shares if share is not None]
    return sum(known_shares) / len(known_shares) if known_shares else None
