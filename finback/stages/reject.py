"""Rejection sampling: samples several answers to each question and selects the right, readable and distinct ones (R1 2.3.3).

The selected answers are lessons for SFT: traces.jsonl holds dialogues in OpenAI's form, with chains as `reasoning_content`.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finback.checkpoint.inference import InferenceDtype
from finback.config import check_not_negative, check_positive, check_share
from finback.data.tokenizer import Tokenizer
from finback.engine.open import load
from finback.engine.request import SamplingParams
from finback.model.config import ModelConfig
from finback.model.count import forward_flops_of
from finback.parallel.mesh import World
from finback.parallel.served_weights import ServedWeights
from finback.rollouts.answer_journal import FOLDER, AnswerJournal, JournaledRollouts
from finback.rollouts.drawing import Window
from finback.rollouts.fleet import Fleet
from finback.rollouts.generation import PolicyModel, Rollouts
from finback.rollouts.here import Here
from finback.rollouts.in_order import in_order
from finback.rollouts.rollouts import Rollout, rollout
from finback.rollouts.servers import Servers
from finback.runs.declaration import Declaration
from finback.runs.files import read_json, write_json, write_lines
from finback.runs.folder import Interrupted, StageRun
from finback.runs.ledger import cost, lacks, spent
from finback.runs.progress import Progress
from finback.runs.recipe import Stage, Work
from finback.stages.exam_questions import askable
from finback.tasks import task as tasks
from finback.tasks.language import consistency, known
from finback.tasks.readable import Readable
from finback.tasks.task import Problem, Task

CHUNK = 128  # questions per output file, over all ranks
AHEAD = 2  # files in progress if servers generate: while one is judged or waits for long answers, the next is generated


@dataclass(frozen=True, kw_only=True)
class Reject(Stage):
    """Samples `num_generations` answers to each of `prompts` training questions and keeps the good ones in traces.jsonl."""

    # a stage, a run, a Hugging Face folder or a .gguf file
    start: str
    # supplies the questions and checks the answers
    task: Task
    # number of questions
    prompts: int = 1000
    # answers per question
    num_generations: int = 4
    # sampling temperature
    temperature: float = 1.0
    # longest answer, in tokens
    max_tokens: int = 96
    # start each answer inside the chain of thought
    think: bool = False
    # drop answers without a chain
    need_chain: bool = True
    # required language of the chain, ISO 639-1; "": any
    language: str = ""
    # minimum share of the chain's words in that language
    pure: float = 0.99
    # drop chains with repetitions, endless paragraphs or jumbled code
    readable: bool = True
    # most answers kept per question: this many if few were right, one if all were
    keep: int = 2
    # largest share of the kept answers that may come from questions that were always solved
    easy: float = 1.0
    # precision of the weights, as for Evaluate
    dtype: InferenceDtype = "fp32"
    # where answers are generated: by an engine in each rank, or by servers that already have the model
    rollouts: Here | Servers | Fleet = Here()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, self.name, "prompts", "num_generations", "max_tokens", "keep")
        check_share(self, self.name, "pure", "easy")
        check_not_negative(self, self.name, "temperature")
        if self.language:
            known(self.language, f"{self.name}.language")

    def work(self) -> Work:
        return Work(tokens_generated=self.prompts * self.num_generations * self.max_tokens)

    def declaration(self) -> Declaration:
        return Declaration(
            "rejection sampling",
            ledger=("tokens_generated", "flops", "flops_generation"),
            results=(
                *("kept", "sampled", "reasons", "questions_by_difficulty", "kept_by_difficulty"),
                *("per_kept", "too_long", "contaminated"),
            ),
        )

    def describe(self, results: dict[str, Any]) -> str:
        reasons = ", ".join(f"{n:,} {why}" for why, n in results["reasons"].items())
        kept, sampled = results["kept"], results["sampled"]
        text = f"Rejection sampling '{self.name}' kept {kept:,} of {sampled:,} answers: {reasons}."
        each = results.get("per_kept")
        if not each:
            return text
        money = "unknown money" if each["money_usd"] is None else f"${each['money_usd']:.2g}"
        return f"{text} Each cost {each['tokens']:,.0f} tokens and {money}."

    def run(self, run: StageRun) -> dict[str, Any]:
        world = World.of(run)
        model, tokenizer = load(run.input(self.start), self.dtype)
        model = model.to(world.device)
        sampling = SamplingParams(self.temperature, self.max_tokens)
        drawn = tasks.distinct(self.task, "train", self.prompts, run.seed("questions"))
        window = Window(tokenizer, model.config, self.max_tokens, self.think)
        problems, left_out = askable(self.task, drawn, window, run)
        compute = "bf16" if model.compute == torch.bfloat16 else "fp32"
        policy = PolicyModel(ServedWeights(model), model.config, tokenizer, run, compute, learns=False)
        rollouts = self.rollouts.open(policy, sampling)
        try:
            rollouts.update(0)
            self._answer(run, rollouts, tokenizer, problems, sampling)
        finally:
            rollouts.close()
        return self._collect(run) | left_out if run.is_writer else {}

    def _answer(
        self,
        run: StageRun,
        rollouts: Rollouts,
        tokenizer: Tokenizer,
        problems: Sequence[Problem],
        sampling: SamplingParams,
    ) -> None:
        """Answers and judges all questions, one file per chunk; chunks answered by an earlier run are reused."""
        world, starts = World.of(run), range(0, len(problems), CHUNK)
        progress = Progress(run, len(problems), "questions", spent(run.folder)["seconds"])
        missing = [start for start in starts if not self._path(run, start).is_file()]
        world.barrier()  # every rank has checked for files before the first is written

        def mine(start: int) -> range:
            return range(start + world.rank, min(start + CHUNK, len(problems)), world.size)

        def answered(start: int) -> list[Rollout]:
            journal, count = AnswerJournal(run.folder / FOLDER, world.rank), range(self.num_generations)
            asked = [problems[i] for i in mine(start) for _ in count]
            seeds = [run.seed("answer", i, k) for i in mine(start) for k in count]
            journal.begin(start)
            try:
                given = self.task, asked, seeds, sampling, self.think
                return rollout(JournaledRollouts(rollouts, journal), tokenizer, *given)
            finally:
                journal.close()

        for start, answers in in_order(answered, missing, 1 if isinstance(self.rollouts, Here) else AHEAD):
            self._keep(
                run, rollouts.model_config, start, dict(zip(mine(start), self._judge(answers), strict=True)), answers
            )
            AnswerJournal(run.folder / FOLDER, world.rank).forget(start)
            progress.show(min(start + CHUNK, len(problems)))
            if run.check_stop():
                raise Interrupted

    def _keep(
        self, run: StageRun, config: ModelConfig, start: int, judged: dict[int, Any], answers: Sequence[Rollout]
    ) -> None:
        """Writes all ranks' results of a chunk and accounts for them."""
        made = sum(len(r.completion.tokens) for r in answers)
        flops = forward_flops_of(config, [r.length for r in answers])
        gathered = World.of(run).gather((judged, made, flops))
        if run.is_writer:
            whole = {i: found for part, _, _ in gathered for i, found in part.items()}
            write_json(self._path(run, start), [whole[i] for i in sorted(whole)])
        run.gather_external()
        total, flops = (sum(numbers) for numbers in zip(*(g[1:] for g in gathered), strict=True))
        run.account(tokens_generated=total, flops=flops, flops_generation=flops)

    def _path(self, run: StageRun, start: int) -> Path:
        return run.folder / f"part-{start:08}.json"

    def _judge(self, answers: list[Rollout]) -> list[dict[str, Any]]:
        """For each question: the number of right answers, the good ones, and the reasons why others were rejected."""
        found = []
        for start in range(0, len(answers), self.num_generations):
            group = answers[start : start + self.num_generations]
            reasons: Counter[str] = Counter()
            good: list[dict[str, str]] = []
            for r in group:
                reason = self._reason(r)
                trace = {"reasoning_content": r.response.reasoning, "content": r.response.answer}
                if not reason and trace in good:
                    reason = "repeated"
                reasons[reason or "good"] += 1
                if not reason:
                    good.append(trace)
            asked, right = group[0].problem, sum(r.verdict.correct for r in group)
            judged = {"right": right, "good": good, "reasons": dict(reasons)}
            found.append({"question": asked.question, "key": asked.key, **judged})
        return found

    def _reason(self, r: Rollout) -> str:
        """Why an answer is rejected; "" for a good one."""
        chain = r.response.reasoning
        if not r.verdict.correct:
            return "wrong"
        if self.need_chain and not chain:
            return "no chain"
        if self.language and chain and (consistency(chain, self.language) or 0.0) < self.pure:
            return "other language"
        if self.readable and chain:
            # the language was checked above, if one is required
            return next(iter(Readable(self.language or "en", consistency=0.0).faults(chain)), "")
        return ""

    def _collect(self, run: StageRun) -> dict[str, Any]:
        """Selects by difficulty and writes traces.jsonl."""
        parts, samples = sorted(run.folder.glob("part-*.json")), self.num_generations
        found = [question for path in parts for question in read_json(path)]
        sampled = len(found) * samples
        reasons: Counter[str] = Counter()
        for question in found:
            reasons.update(question["reasons"])
        kept = choose(found, samples, self.keep, self.easy, random.Random(run.seed("choice")))
        if not kept:
            problem = f"none of {sampled} answers can be kept ({dict(reasons)})"
            raise self.wrong("start", problem, "Use a better model, easier questions, or keep more.")
        run.account()
        bill = cost(run.folder)
        write_lines(run.folder / "traces.jsonl", [_line(q, t, samples) for q, t in kept])
        why = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())
        run.say(f"{self.name:10} kept {len(kept):,} of {sampled:,} answers; {why}")
        return {
            "kept": len(kept),
            "sampled": sampled,
            "reasons": dict(reasons),
            "per_kept": {"tokens": bill["tokens_generated"] / len(kept), "money_usd": _each(bill, len(kept))},
            "questions_by_difficulty": dict(Counter(_difficulty(q["right"], samples) for q in found)),
            "kept_by_difficulty": dict(Counter(_difficulty(q["right"], samples) for q, _ in kept)),
        }


Trace = tuple[dict[str, Any], dict[str, str]]  # a question as `_judge` returns it, and a good answer


def choose(found: Sequence[dict[str, Any]], samples: int, keep: int, easy: float, rng: random.Random) -> list[Trace]:
    """Selected traces in random order: more for questions that were solved rarely, and a limited share of easy ones.

    A question solved in a share p of its samples gives up to 1 + (keep - 1)(1 - p) traces, rounded up. A chain that
    occurs word for word with several questions is kept once.
    """
    seen: set[str] = set()
    hard: list[Trace] = []
    always: list[Trace] = []
    for question in found:
        traces = list(question["good"])
        rng.shuffle(traces)
        most = math.ceil(1 + (keep - 1) * (1 - question["right"] / samples))
        fresh = [t for t in traces if t["reasoning_content"] not in seen or not t["reasoning_content"]]
        taken = fresh[:most]
        seen |= {t["reasoning_content"] for t in taken}
        (always if question["right"] == samples else hard).extend((question, t) for t in taken)
    if easy < 1:
        rng.shuffle(always)
        always = always[: int(len(hard) * easy / (1 - easy))]
    chosen = hard + always
    rng.shuffle(chosen)
    return chosen


def _each(bill: dict[str, Any], kept: int) -> float | None:
    """Dollars for each kept answer; None if the engines' price is unknown."""
    return None if lacks(bill, "money") else bill["money_usd"] / kept


def _difficulty(right: int, samples: int) -> str:
    share = right / samples
    names = ((0.0, "never solved"), (1 / 3, "hard"), (2 / 3, "middling"), (0.999, "easy"), (1.0, "always solved"))
    return next(name for most, name in names if share <= most)


def _line(question: dict[str, Any], trace: dict[str, str], samples: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": question["question"]}, {"role": "assistant", **trace}]
    return {"messages": messages, "solved": question["right"] / samples, "key": question["key"]}
