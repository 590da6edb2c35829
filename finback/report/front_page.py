"""Texts of the bare `finback` command: the welcome, help, and errors in the command line. Does not import torch."""

import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import typer
import typer.core

from finback import __version__
from finback.config import UserError, did_you_mean

HELP = ["-h", "--help"]

WELCOME = f"""finback {__version__} builds, trains, checks and serves DeepSeek-class language models.

Start with the quickstart, which takes minutes on a laptop: a tiny model learns
to think before it answers.

  finback run recipes/tiny.py    pre-train it, then teach it with RL
  finback chat runs/tiny         chat with the result
  finback watch                  watch its runs in a browser

Then teach an open checkpoint your own task, ask two models the same questions,
and estimate a run before it starts:

  finback run recipes/your_task.py --set rl.start=MODEL
  finback compare MODEL OTHER --tasks gsm8k
  finback plan v3 --on h800:2048

`finback help` lists all commands, `finback help COMMAND` explains one, and
`finback doctor` says what this machine can do."""


def explained(context: typer.Context, command: str) -> str:
    """The help text of a command, or of the program for "". Raises UserError for an unknown name."""
    above = context.parent
    assert above is not None, "a command is below the program"
    group = above.command
    assert isinstance(group, typer.core.TyperGroup), "the program has commands"
    if not command:
        return above.get_help()
    if command not in group.commands:
        raise UserError("help", command, "no such command", did_you_mean(command, group.commands))
    chosen = group.commands[command]
    with type(context)(chosen, info_name=command, parent=above, help_option_names=HELP) as inner:
        return chosen.get_help(inner)


def complaint(error: Any) -> str:
    """click's error about a command line, and how to get help."""
    said, context = error.format_message().rstrip(".").replace("Value error, ", ""), getattr(error, "ctx", None)
    if context is None:
        return f"{said}."
    if unknown := re.match(r"No such command '(.*?)'", said):
        return f"{unknown[0]}. {did_you_mean(unknown[1], context.command.commands)} `finback help` explains them."
    return f"{said}. `finback help {context.info_name}` explains it."


def open_streams() -> None:
    """Replaces closed standard streams (`>&-`) by the null device, and prints a substitute for characters that cannot be encoded."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 (for as long as we run)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def without_reader(error: BaseException) -> int:
    """Exit code 0 if the reader of stdout has closed it, as `| head` does; any other error is raised again.

    Typer and rich turn the broken pipe into a SystemExit. Nothing more is written.
    """
    if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
        raise error
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
