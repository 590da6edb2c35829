"""The options of `finback compare`. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option
from typer.core import TyperCommand

from finback.comparison.score import MAX_NO_ANSWER
from finback.config import UserError, check_not_negative, check_positive
from finback.options import Dtype, Options


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options):
    """Who is asked what, how, and at what price."""

    models: Annotated[
        tuple[Path, ...],
        Argument(metavar="MODEL...", help="Runs, stages, Hugging Face folders, .gguf files, org/model of the hub."),
    ] = ()
    tasks: Annotated[
        tuple[str, ...],
        Option(metavar="TASK...", help="Suites by name, such as gsm8k, or JSONL files; as many as you like."),
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
    top_p: Annotated[float, "Likeliest tokens up to this probability."] = 0.95
    max_tokens: Annotated[int, "Longest answer, its chain included."] = 32768
    seed: Annotated[int, "Same seed, same questions and, from models here, same answers."] = 0
    think: Annotated[bool | None, Option("--think/--no-think", help="Open the chain of thought, or ask for none.")] = (
        None
    )
    out: Annotated[Path, "Folder for answers, tables and the picture; it is what is continued."] = Path("compare")
    max_no_answer: Annotated[
        float, "Share of a model's answers without one of the asked form above which no verdict is spoken; 1 is never."
    ] = MAX_NO_ANSWER
    price_in: Annotated[
        tuple[str, ...], Option(metavar="[MODEL=]DOLLARS", help="An endpoint's price of a million prompt tokens.")
    ] = ()
    price_out: Annotated[
        tuple[str, ...], Option(metavar="[MODEL=]DOLLARS", help="The same for a million tokens of answers.")
    ] = ()
    price_hour: Annotated[float | None, "What this machine costs an hour, in dollars; default an estimate."] = None
    key_env: Annotated[
        tuple[str, ...],
        Option(
            metavar="[MODEL=]VARIABLE", help="Environment variable with an endpoint's key; also FINBACK_ENDPOINT_KEY."
        ),
    ] = ()
    extra: Annotated[
        str, Option(metavar="JSON", help="Fields for every request to an endpoint; null takes one out.")
    ] = ""
    concurrency: Annotated[int, "Requests to an endpoint at a time, to each of its servers."] = 8
    rate: Annotated[float, "Requests to an endpoint per minute; 0 is any number."] = 0.0
    timeout: Annotated[float, "Seconds that an endpoint may be silent."] = 300.0
    rows: Annotated[int, "Answers that a model here makes at a time."] = 32
    dtype: Dtype = "auto"
    harness: Annotated[str, Option(metavar="lm-eval TASK...", help="Have lm-evaluation-harness ask its own tasks.")] = (
        ""
    )
    harness_python: Annotated[Path | None, "The Python in which the harness is installed; default this one."] = None
    harness_chat: Annotated[
        bool, Option("--harness-chat", help="Ask models here as a chat, not as a text to go on with.")
    ] = False
    published: Annotated[bool, Option("--published", help="Print published scores beside what was measured.")] = False
    contamination: Annotated[
        tuple[Path, ...],
        Option(metavar="FOLDER", help="A prepare stage: say which questions its text holds; repeatable."),
    ] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.harness not in ("", "lm-eval"):
            raise UserError("--harness", self.harness, "no such harness", "Use lm-eval.")
        if not self.tasks and not self.published:
            raise UserError("--tasks", [], "nothing to ask", "Name suites, as in --tasks gsm8k.")
        if self.tasks and not self.models and not self.endpoints:
            raise UserError("MODEL", [], "nobody to ask", "Name models, or an --endpoint URL#MODEL.")
        check_positive(self, "--", "problems", "samples", "max_tokens", "concurrency", "rows")
        check_not_negative(self, "--", "rate", "price_hour", "timeout", "max_no_answer")
        if self.max_no_answer > 1:
            raise UserError("--max-no-answer", self.max_no_answer, "above 1", "Write a share, such as 0.1.")


class Spread(TyperCommand):
    """A command whose --tasks takes all words up to the next option, as does --harness behind its first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As it is, with --tasks before each of its words."""
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
