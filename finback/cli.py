"""The command line: help, run, plan, show, doctor, chat, serve, watch, verify, compare, export, docs, track.

Progress and messages go to stderr, results to stdout. Exit codes: 0 success, 2 user error (one line, no traceback),
130 interrupted (the same command continues the run). Environment variables are read only here and in
kernels/native.py, which looks for a compiler.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from finback import __version__
from finback.comparison import options as comparing
from finback.config import UserError
from finback.options import Settings, with_options
from finback.parallel import launch
from finback.parallel.execute import RankFailed, execute, on_ray
from finback.planner.options import PlanOptions
from finback.report import front_page
from finback.report.options import ChatOptions, DocsOptions, ExportOptions, TrackOptions, VerifyOptions
from finback.runs import reader
from finback.runs import recipe as recipes
from finback.runs.files import disk_trouble
from finback.runs.folder import Interrupted
from finback.serve.options import ServeOptions, WatchOptions

app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": front_page.HELP})

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def main() -> None:
    """Runs a command and turns every foreseen failure into one line and an exit code."""
    front_page.open_streams()
    if "RANK" in os.environ:  # until the run installs its own handler, which stops at a safe point
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        code = _fail(str(error))
    except typer.Exit as error:
        code = error.exit_code
    except (Interrupted, KeyboardInterrupt, typer.Abort):
        code = launch.INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        code = front_page.without_reader(error)
    except OSError as error:
        text = disk_trouble(error)
        if not text:
            raise
        code = _fail(text)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's errors about the command line have it
            raise
        code = _fail(front_page.complaint(error))
    _end(code or 0)


def _end(code: int) -> None:
    """Exits with a code. One rank of several skips the shutdown of the interpreter.

    Threads of a finished process group may still hold tensors. Freeing one during interpreter shutdown aborts the process
    with signal 6, although all its work is done and on disk.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """finback builds, trains, checks and serves DeepSeek-class language models."""
    if show_version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(front_page.WELCOME)


@app.command("help")
def help_(
    context: typer.Context,
    command: Annotated[str, typer.Argument(metavar="COMMAND", help="What to explain; default: all commands.")] = "",
) -> None:
    """Explain a command, or list them all."""
    print(front_page.explained(context, command))


@app.command()
@with_options
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, e.g. recipes/tiny.py.")],
    runs: Annotated[Path, "Folder that holds the run folders."] = Path("runs"),
    settings: Settings = (),
    seed: Annotated[int, "Seed of all random numbers."] = 0,
    ranks: Annotated[int, "Processes; 0 means one per GPU or, without any, per core."] = 0,
    ray: Annotated[str, "Address of a Ray, e.g. auto or HOST:6379, for all fleets and for --ranks N above 1."] = "",
    as_json: Json = False,
) -> None:
    """Run a recipe, or continue it: finished stages are reused, an interrupted stage resumes."""
    plan = on_ray(recipes.load(recipe, settings), ray, ranks)
    root = runs / plan.name
    try:
        if not execute(plan, root, seed, ranks or launch.default_ranks(), sys.argv[1:], ray if ranks else ""):
            return
    except RankFailed as error:
        raise typer.Exit(error.code) from None
    from finback.report import summary

    text = summary.summarize(root)
    if as_json:
        print(text, file=sys.stderr)
    _print(reader.summary(root), text, as_json)


@app.command()
@with_options
def plan(options: PlanOptions, as_json: Json = False) -> None:
    """Estimate a run before it starts: layout, memory, time, money and energy, with the source of each number."""
    from finback.planner import calibration_file, command

    path = options.calibration or calibration_file.default_path(os.environ)
    if options.calibrate and "RANK" in os.environ:
        rank, threads = int(os.environ["RANK"]), int(os.environ.get("OMP_NUM_THREADS", "1"))
        return command.measure(rank, int(os.environ["WORLD_SIZE"]), threads, path)
    if options.calibrate and (code := launch.launch(sys.argv[1:], options.ranks or launch.default_ranks())):
        raise typer.Exit(code)
    return _print(*command.run(options, path), as_json)


@app.command()
@with_options
def show(
    what: Annotated[
        str, typer.Argument(metavar="RUN|RECIPE|NAME", help="A run folder, a recipe file, or the name of a class.")
    ],
    settings: Settings = (),
    samples: Annotated[
        bool, typer.Option("--samples", help="Show the model's answers in RL, and their rewards.")
    ] = False,
    stage: Annotated[str, "With --samples: only this stage."] = "",
    step: Annotated[int, "With --samples: only this step; default: the first, a middle and the last one."] = 0,
    count: Annotated[int, "With --samples: questions per step."] = 2,
    as_json: Json = False,
) -> None:
    """Show a run's results or samples, or the knobs of a recipe or of anything in one (GRPO, Questions, …)."""
    from finback.report import show as report

    if samples:
        values, text = report.samples_of(Path(what), stage, step, count, as_json)
    else:
        values, text = report.shown(what, settings, _beside_plan, as_json)
    _print(values, text, as_json)


@app.command()
@with_options
def doctor(as_json: Json = False) -> None:
    """Report what this machine and installation can do, what is missing, and how to install it."""
    from finback.report import doctor as report

    _print(*report.report(os.environ), as_json)


@app.command()
@with_options
def chat(options: ChatOptions, as_json: Json = False) -> None:
    """Chat with a model: one line a turn, thinking dimmed. /new starts a new dialogue, /help lists more, Ctrl-D quits."""
    from finback.report.chat import loop

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    loop(replace(options, kept=state / "finback" / "chats"), as_json, "NO_COLOR" not in os.environ)


@app.command()
@with_options
def serve(options: ServeOptions) -> None:
    """Serve a model with OpenAI's and DeepSeek's API; reachable from this machine only, unless --host names another address."""
    from finback.serve import server

    server.run(replace(options, api_key=os.environ.get("FINBACK_API_KEY", "")), _planned)


@app.command()
@with_options
def watch(options: WatchOptions) -> None:
    """Watch runs in a browser: stages, curves, and the model's answers as it learns. It only reads run folders."""
    from finback.serve import watch as page

    page.run(replace(options, api_key=os.environ.get("FINBACK_API_KEY", "")), _planned)


@app.command()
@with_options
def verify(options: VerifyOptions, as_json: Json = False) -> None:
    """Check a checkpoint against its config, its closed form and transformers; exit code 1 unless every check passes."""
    from finback.report import verify as report

    card = report.verify(options.folder, options.against, options.max_kl)
    print(json.dumps(card.as_json()) if as_json else card.as_text(), end="\n" if as_json else "")
    try:
        report.write(card, options.card)
    except OSError as error:
        if options.out is not None:
            raise
        print(f"the card was not written to {options.card}: {error.strerror}; set another --out", file=sys.stderr)
    if not card.holds:
        raise typer.Exit(1)


@app.command(cls=comparing.Spread)
@with_options
def compare(options: comparing.CompareOptions, as_json: Json = False) -> None:
    """Ask models the same questions: scores with intervals, significant differences, and the cost of an answer.

    Answers are stored in --out; the same command asks only what is missing. Exit code 1 if some requests failed for good.
    """
    from finback.comparison.compare import run

    report, text, complete = run(options, os.environ)
    _print(report, text, as_json)
    if not complete:
        print("some requests failed; run the same command to retry them", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
@with_options
def export(options: ExportOptions, as_json: Json = False) -> None:
    """Write a model as a Hugging Face folder for transformers, vLLM and others, or as a GGUF file for llama.cpp and Ollama."""
    from finback.report.export import export_as

    folder, files = options.folder, {f.name: f.stat().st_size for f in export_as(options)}
    size = f"{sum(files.values()) / 1e6:,.1f} MB"
    text = f"{folder}: {len(files)} files, {size}. Check them with `finback verify {folder}`."
    _print({"folder": str(folder), "files": files}, text, as_json)


@app.command()
@with_options
def docs(options: DocsOptions, as_json: Json = False) -> None:
    """Write the documents that a model's maker must publish, from a run's records: report, card, EU forms, bills of materials."""
    from finback.report.docs import command, questionnaire

    if options.questions:
        print(questionnaire.TEMPLATE, end="")
        return
    values, text = command.run(options)
    _print(values, text, as_json)
    if options.check and not values["complete"]:
        raise typer.Exit(1)


@app.command()
@with_options
def track(options: TrackOptions, as_json: Json = False) -> None:
    """Send a run's curves to another viewer, during the run or afterwards."""
    from finback.report import track as report

    sent = report.track(options.run, options.to, options.out, options.follow)
    text = f"{sum(sent.values()):,} rows of {len(sent)} stages sent to {options.to}"
    if options.to == "tensorboard":
        text += f"\nView them: tensorboard --logdir {options.out}"
    _print({"to": options.to, "lines": sent}, text, as_json)


def _beside_plan(root: Path) -> tuple[dict[str, Any], str]:
    """Plan and actual of a run, as JSON values and as text."""
    from finback.planner import calibration_file, plan_vs_actual

    beside = plan_vs_actual.plan_and_actual(root, calibration_file.default_path(os.environ))
    return beside, plan_vs_actual.text(beside)


def _planned(root: Path) -> dict[str, dict[str, float]]:
    """The planned costs of a run's stages, for the page."""
    from finback.planner import calibration_file, plan_vs_actual

    return plan_vs_actual.planned(root, calibration_file.default_path(os.environ))


def _print(values: Any, text: str, as_json: bool) -> None:
    print(json.dumps(values, ensure_ascii=False) if as_json else text)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
