"""Checks of the knob `compile`, which Pretrain, SFT, Distill and GRPO have in common."""

from typing import Any

from finback.runs.folder import StageRun


def check_knobs(stage: Any, wrong: dict[str, str]) -> None:
    """Raises UserError for the first knob whose value does not work with compiled blocks."""
    for name, value in wrong.items() if stage.compile else ():
        if getattr(stage, name) == value:
            raise stage.wrong(name, "cannot be compiled", "Change it, or leave out compile.")


def check_compiler(stage: Any, run: StageRun) -> None:
    """Raises UserError if `compile` is set and this machine cannot compile."""
    if not stage.compile:
        return
    from finback.train import compiling  # takes seconds to import

    problem = compiling.why_not()
    if problem:
        remedy = "Install g++ and Python's headers (Debian: apt-get install g++ python3-dev), or leave out compile."
        raise stage.wrong("compile", f"does not work here: {problem}", remedy)
    run.say(f"{stage.name:10} blocks are compiled in the first step, which may take a minute")
