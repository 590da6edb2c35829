"""The options of `finback compare`. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option
from typer.core import TyperCommand

from finback.comparison.score import MAX_NO_ANSWER
from finback.config import UserError, check_not_negative, check_positive
from finback.options import Dtype, EngineEnv, EngineFlags, EnginePython, Options


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options):
    """Contestants, suites, sampling and prices of a comparison."""

    models: Annotated[
        tuple[Path, ...],
        Argument(metavar="MODEL...", help="Runs, stages, Hugging Face folders, .gguf files, org/model of the hub."),
    ] = ()
    tasks: Annotated[
        tuple[str, ...], Option(metavar="TASK...", help="Suites by name, such as gsm8k, or JSONL files; one or more.")
    ] = ()
    endpoints: Annotated[
        tuple[str, ...],
        Option(
            "--endpoint",
            metavar="URL[,URL]#MODEL",
            help="A model behind an OpenAI-compatible API, on one server or shared by several; repeatable.",
        ),
    ] = ()
    problems: Annotated[int | None, "Questions of each suite; default all."] = None
    samples: Annotated[int | None, "Answers to each question; default 4, or 1 if greedy."] = None
    temperature: Annotated[float, "0 is greedy."] = 0.6
    top_p: Annotated[float, "Samples from the likeliest tokens up to this total probability."] = 0.95
    max_tokens: Annotated[int, "Longest answer in tokens, chain of thought included."] = 32768
    seed: Annotated[int, "Same seed, same questions and, from models in files, same answers."] = 0
    think: Annotated[
        bool | None, Option("--think/--no-think", help="Open a chain of thought, or suppress it; default the model's.")
    ] = None
    out: Annotated[Path, "Folder of answers, tables and picture; answers stored there are reused."] = Path("compare")
    max_no_answer: Annotated[
        float, "No verdict on a model if a larger share of its answers lacks the requested form; 1 always gives one."
    ] = MAX_NO_ANSWER
    price_in: Annotated[
        tuple[str, ...], Option(metavar="[MODEL=]DOLLARS", help="An endpoint's price per million prompt tokens.")
    ] = ()
    price_out: Annotated[
        tuple[str, ...], Option(metavar="[MODEL=]DOLLARS", help="An endpoint's price per million generated tokens.")
    ] = ()
    price_hour: Annotated[float | None, "This machine's price per hour in dollars; default an estimate."] = None
    key_env: Annotated[
        tuple[str, ...],
        Option(
            metavar="[MODEL=]VARIABLE", help="Environment variable with an endpoint's key; also FINBACK_ENDPOINT_KEY."
        ),
    ] = ()
    extra: Annotated[
        str, Option(metavar="JSON", help="Fields for every request to an endpoint; null removes a field.")
    ] = ""
    concurrency: Annotated[int, "Concurrent requests to each server of an endpoint."] = 8
    rate: Annotated[float, "Requests to an endpoint per minute; 0 is no limit."] = 0.0
    timeout: Annotated[float, "Seconds without data from an endpoint before a request fails."] = 300.0
    rows: Annotated[int, "Answers that a model in files generates in one batch."] = 32
    dtype: Dtype = "auto"
    engine: Annotated[
        Literal["finback", "vllm", "sglang"],
        "The engine that runs models in files: finback's own, or a program that is started for them.",
    ] = "finback"
    replicas: Annotated[int, "Engines that share a model's questions; more than one run in separate processes."] = 1
    engine_python: EnginePython = ""
    engine_flags: EngineFlags = ()
    engine_env: EngineEnv = ()
    harness: Annotated[str, Option(metavar="lm-eval TASK...", help="Run tasks of lm-evaluation-harness instead.")] = ""
    harness_python: Annotated[Path | None, "The Python in which the harness is installed; default this one."] = None
    harness_chat: Annotated[
        bool,
        Option("--harness-chat", help="Send harness prompts to models in files as chats, not as text to continue."),
    ] = False
    published: Annotated[bool, Option("--published", help="Also print published scores.")] = False
    contamination: Annotated[
        tuple[Path, ...],
        Option(metavar="FOLDER", help="A prepare stage whose text is searched for the questions; repeatable."),
    ] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.harness not in ("", "lm-eval"):
            raise UserError("--harness", self.harness, "no such harness", "Use lm-eval.")
        if not self.tasks and not self.published:
            raise UserError("--tasks", [], "no suite named", "Name suites, for example --tasks gsm8k.")
        if self.tasks and not self.models and not self.endpoints:
            raise UserError("MODEL", [], "no model named", "Name models, or an --endpoint URL#MODEL.")
        check_positive(self, "--", "problems", "samples", "max_tokens", "concurrency", "rows", "replicas")
        check_not_negative(self, "--", "rate", "price_hour", "timeout", "max_no_answer")
        if self.max_no_answer > 1:
            raise UserError("--max-no-answer", self.max_no_answer, "above 1", "Write a share, such as 0.1.")
        self._check_engine()

    @property
    def serves(self) -> bool:
        """Whether models in files run in separate processes."""
        return self.engine != "finback" or self.replicas > 1

    def _check_engine(self) -> None:
        """Raises UserError for options of engines that do not go together."""
        if self.serves and (self.harness or not self.models):
            flag, value = ("--engine", self.engine) if self.engine != "finback" else ("--replicas", self.replicas)
            problem = "the harness starts its own server" if self.harness else "no model in files is named"
            raise UserError(flag, value, problem, "Leave it out.")
        if self.engine == "finback":
            for name in ("engine_python", "engine_flags", "engine_env"):
                if value := getattr(self, name):
                    flag = f"--{name.removesuffix('s').replace('_', '-')}"
                    raise UserError(flag, str(value), "is for --engine vllm or sglang", "Leave it out.")
        elif not self.engine_python:
            problem = f"{self.engine} runs in its own environment"
            raise UserError("--engine-python", "", problem, "Give the Python of that environment.")
        elif self.dtype != "auto":
            problem = "is for finback's own engine"
            raise UserError("--dtype", self.dtype, problem, "Use --engine-flag=--dtype=..., or leave it out.")


class Spread(TyperCommand):
    """A command whose --tasks takes all words up to the next option; so does --harness after its first word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses `args` with --tasks repeated before each of its words."""
        return super().parse_args(ctx, spread(args))


def spread(words: Sequence[str]) -> list[str]:
    """--tasks a b becomes --tasks a --tasks b, and --harness x a b becomes --harness x --tasks a --tasks b."""
    found: list[str] = []
    option, taken = "", 0
    for word in words:
        is_option = word.startswith("--") or (word.startswith("-") and len(word) == 2)
        option, taken = (word, 0) if is_option else (option, taken + 1)
        found += ["--tasks", word] if taken > 1 and option in ("--tasks", "--harness") else [word]
    return found
