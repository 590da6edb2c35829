"""The options of `finback compare` as the command line shows them. No torch here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Models = Annotated[
    list[Path] | None, typer.Argument(metavar="MODEL...", help="Runs, stages, Hugging Face folders, .gguf files.")
]
Tasks = Annotated[
    list[str],
    typer.Option(metavar="TASK...", help="Suites by name, such as gsm8k, or JSONL files; as many as you like."),
]
Endpoints = Annotated[
    list[str], typer.Option(metavar="URL#MODEL", help="A model behind an OpenAI-compatible API; repeatable.")
]
Problems = Annotated[int | None, typer.Option(help="Questions of each suite; default all.")]
Samples = Annotated[int | None, typer.Option(help="Answers to each question; default 4, or 1 if greedy.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Likeliest tokens up to this probability.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, its chain included.")]
Seed = Annotated[int, typer.Option(help="Same seed, same questions and, from models here, same answers.")]
Think = Annotated[bool | None, typer.Option("--think/--no-think", help="Open the chain of thought, or ask for none.")]
Out = Annotated[Path, typer.Option(help="Folder for answers, tables and the picture; it is what is continued.")]
PriceIn = Annotated[
    list[str], typer.Option(metavar="[MODEL=]DOLLARS", help="An endpoint's price of a million prompt tokens.")
]
PriceOut = Annotated[
    list[str], typer.Option(metavar="[MODEL=]DOLLARS", help="The same for a million tokens of answers.")
]
PriceHour = Annotated[
    float | None, typer.Option(help="What this machine costs an hour, in dollars; default an estimate.")
]
KeyEnv = Annotated[
    list[str],
    typer.Option(
        metavar="[MODEL=]VARIABLE", help="Environment variable with an endpoint's key; also FINBACK_ENDPOINT_KEY."
    ),
]
Extra = Annotated[
    str, typer.Option(metavar="JSON", help="Fields for every request to an endpoint; null takes one out.")
]
Concurrency = Annotated[int, typer.Option(help="Requests to an endpoint at a time.")]
Rate = Annotated[float, typer.Option(help="Requests to an endpoint per minute; 0 is any number.")]
Timeout = Annotated[float, typer.Option(help="Seconds that an endpoint may be silent.")]
Rows = Annotated[int, typer.Option(help="Answers that a model here makes at a time.")]
Harness = Annotated[str, typer.Option(metavar="lm-eval TASK...", help="Have lm-evaluation-harness ask its own tasks.")]
HarnessPython = Annotated[
    Path | None, typer.Option(help="The Python in which the harness is installed; default this one.")
]
HarnessChat = Annotated[
    bool, typer.Option("--harness-chat", help="Ask models here as a chat, not as a text to go on with.")
]
Published = Annotated[bool, typer.Option("--published", help="Print published scores beside what was measured.")]
Contamination = Annotated[
    list[Path], typer.Option(metavar="FOLDER", help="A prepare stage: say which questions its text holds; repeatable.")
]


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
        if word.startswith("--") or (word.startswith("-") and len(word) == 2):
            option, taken = word, 0
            found.append(word)
            continue
        taken += 1
        if (option == "--tasks" and taken > 1) or (option == "--harness" and taken > 1):
            found.append("--tasks")
        found.append(word)
    return found
