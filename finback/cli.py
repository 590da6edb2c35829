"""The command line: run, plan, show, chat, serve, watch, verify, compare, export, docs, track.

Progress and prose go to stderr, results to stdout. Exit codes: 0 done, 2 the user's mistake (one line, no
traceback), 130 interrupted (run the same command to continue). Only this file reads the environment, and
kernels/native.py, which looks for a compiler.
"""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated, get_args

import typer

from finback import __version__
from finback.comparison import options as comparing
from finback.config import UserError, did_you_mean
from finback.parallel import launch
from finback.parallel.execute import RankFailed, execute
from finback.planner import options as plans
from finback.runs import recipe as recipes
from finback.runs.files import read_json
from finback.runs.folder import Interrupted, locked, prepare_folder

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Settings = Annotated[list[str], typer.Option("--set", metavar="STAGE.FIELD=VALUE", help="Change a knob; repeatable.")]


# how a server is reached, with a model or without
Host = Annotated[str, typer.Option(help="Where to listen; other than loopback needs a key.")]
AllowHost = Annotated[list[str], typer.Option(help="A name the server is reached by; repeatable.")]
KeyFile = Annotated[Path | None, typer.Option(help="API keys, one a line, or their SHA-256; also FINBACK_API_KEY.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Listen beyond loopback without a key.")]
Dtype = Annotated[str, typer.Option(help="auto, fp32, bf16, or int8 (weights alone, rounded).")]


def main() -> None:
    """Run a command; turn every foreseen failure into one line and an exit code."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        code = _fail(str(error))
    except typer.Exit as error:
        code = error.exit_code
    except (Interrupted, KeyboardInterrupt, typer.Abort):
        code = launch.INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        code = _fail(
            f"{error.filename or 'disk'}: {error.strerror}. Nothing is half-written; mend it and run the same "
            "command to continue."
        )
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own complaints about the command line
            raise
        code = _fail(error.format_message())
    _end(code or 0)


def _end(code: int) -> None:
    """Leave with an exit code; one rank of several leaves without taking the interpreter down first.

    The threads of an ended process group may still hold tensors. Freeing one while the interpreter is going ends the
    whole process by signal 6, after all its work is done and on disk.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """finback builds, teaches, checks and serves DeepSeek-class language models."""
    if show_version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, e.g. recipes/tiny.py.")],
    runs: Annotated[Path, typer.Option(help="Folder that holds the run folders.")] = Path("runs"),
    settings: Settings = [],  # noqa: B006 - typer reads the default once
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    ranks: Annotated[int, typer.Option(help="Processes; 0 means one per GPU or, without any, per core.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object on stdout.")] = False,
) -> None:
    """Run a recipe, or continue it: finished stages are kept, an interrupted one resumes."""
    plan = recipes.load(recipe, settings)
    root = runs / plan.name
    try:
        if not execute(plan, root, seed, ranks or launch.default_ranks(), sys.argv[1:]):
            return
    except RankFailed as error:
        raise typer.Exit(error.code) from None
    from finback.report import summary

    text = summary.summarize(root)
    if as_json:
        print(json.dumps(read_json(root / "summary.json"), ensure_ascii=False))
        print(text, file=sys.stderr)
    else:
        print(text)


@app.command()
def plan(
    what: plans.What = "",
    on: plans.On = "",
    price: plans.Price = None,
    tokens: plans.Tokens = "",
    mesh: plans.Mesh = "",
    schedule: plans.ScheduleName = "",
    recompute: plans.RecomputeName = "",
    precision: plans.PrecisionName = "",
    optimizer: plans.OptimizerName = "",
    rows: plans.Rows = 0,
    length: plans.Length = 0,
    micro_rows: plans.MicroRows = 1,
    skew: plans.Skew = 0.0,
    assume: plans.Assume = [],  # noqa: B006
    picture: plans.Picture = None,
    settings: Settings = [],  # noqa: B006
    ranks: plans.Ranks = 0,
    calibrate: plans.Calibrate = False,
    calibration: plans.Calibration = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Say what a run will take before it starts: layout, memory, time, money, energy, and where each number is from."""
    from finback.planner import calibration_file, command

    path = calibration or calibration_file.default_path(os.environ)
    if calibrate and "RANK" in os.environ:
        rank, threads = int(os.environ["RANK"]), int(os.environ.get("OMP_NUM_THREADS", "1"))
        return command.measure(rank, int(os.environ["WORLD_SIZE"]), threads, path)
    options = plans.Options(
        on,
        price,
        tokens,
        mesh,
        schedule,
        recompute,
        precision,
        optimizer,
        rows,
        length,
        micro_rows,
        skew,
        tuple(assume),
    )
    ranks = ranks or launch.default_ranks()
    if calibrate and (code := launch.launch(sys.argv[1:], ranks)):
        raise typer.Exit(code)
    if not what and not calibrate:
        raise UserError("plan", "", "nothing to plan", "Name a recipe or a preset, or give --calibrate.")
    if not what:
        values, text = command.calibrated(path)
    elif what.endswith(".py"):
        values, text = command.recipe(Path(what), settings, options, path, ranks, calibration is not None)
    else:
        values, text = command.preset(what, options, picture)
    print(json.dumps(values, ensure_ascii=False) if as_json else text)
    return None


@app.command()
def show(
    what: Annotated[str, typer.Argument(metavar="RUN|RECIPE|STAGE", help="A run folder, a recipe file, or a stage.")],
    settings: Settings = [],  # noqa: B006
    samples: Annotated[
        bool, typer.Option("--samples", help="Show what the model said in RL, and what it earned.")
    ] = False,
    stage: Annotated[str, typer.Option(help="With --samples: of this stage alone.")] = "",
    step: Annotated[int, typer.Option(help="With --samples: of this step; else first, middle, last.")] = 0,
    count: Annotated[int, typer.Option(help="With --samples: questions per step.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Show a run's results or samples, a recipe's knobs, or the source of a stage, which is its documentation."""
    from finback.report import outline, summary
    from finback.report import samples as sampled

    path = Path(what)
    if samples:
        if not path.is_dir():
            raise UserError("show", what, "not a run folder", "Name a folder such as runs/tiny.")
        if as_json:
            print(json.dumps({"samples": sampled.find(path, stage, step)}, ensure_ascii=False))
        else:
            print(sampled.describe(path, stage, step, count))
    elif path.is_dir():
        if not (path / "summary.json").is_file():
            raise UserError("run", what, "holds no summary.json", "Name a folder such as runs/tiny.")
        from finback.planner import calibration_file, plan_vs_actual

        beside = plan_vs_actual.beside(path, calibration_file.default_path(os.environ))
        if as_json:
            print(json.dumps(read_json(path / "summary.json") | {"plan_and_ledger": beside}, ensure_ascii=False))
        else:
            print(f"{summary.summarize(path)}\n\n{plan_vs_actual.tell(beside)}")
    elif path.suffix == ".py":
        plan = recipes.load(path, settings)
        print(json.dumps(outline.knobs(plan), ensure_ascii=False) if as_json else outline.outline(plan))
    else:
        source = outline.stage_source(what)
        print(json.dumps({"stage": what, "source": source}) if as_json else source)


@app.command()
def chat(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A run, a stage's folder, a Hugging Face folder or a .gguf file.")
    ],
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; default the model's own setting, else 0.7.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Likeliest tokens up to this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens this likely against the likeliest.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest reply; default an eighth of the window, 1024 at most.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same replies.")] = 0,
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole dialogue as one JSON object.")] = False,
) -> None:
    """Talk to a model: one line a turn, thinking dimmed. /new forgets the dialogue, /help names more, Ctrl-D ends it."""
    from finback.report import talk

    _check_dtype(dtype)
    talk.loop(
        model,
        seed,
        as_json,
        "NO_COLOR" not in os.environ,
        dtype,  # type: ignore[arg-type]
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        max_tokens=max_tokens,
    )


@app.command()
def serve(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A run, a stage, a Hugging Face folder or a .gguf file.")
    ],
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Which port.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What requests call the model; default its folder.")] = None,
    alias: Annotated[list[str], typer.Option(help="Another name for it; repeatable.")] = [],  # noqa: B006
    dtype: Dtype = "auto",
    rows: Annotated[int, typer.Option(help="Answers made at a time.")] = 32,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens the cache holds; default what a quarter of the free memory does.")
    ] = None,
    chunk: Annotated[int, typer.Option(help="Prompt tokens read between two steps of the others.")] = 256,
    queue: Annotated[int, typer.Option(help="Answers that may wait; beyond, requests get 503.")] = 64,
    reuse: Annotated[bool, typer.Option(help="Read the beginnings that prompts share once.")] = True,
    speculate: Annotated[bool, typer.Option(help="Draft with the model's MTP module, if it has one.")] = True,
    key_file: KeyFile = None,
    insecure: Insecure = False,
    allow_host: AllowHost = [],  # noqa: B006
    allow_origin: Annotated[list[str], typer.Option(help="A site whose pages may ask; repeatable.")] = [],  # noqa: B006
    reasoning: Annotated[
        str, typer.Option(help="Where chains go: both, deepseek, openrouter, inline or none.")
    ] = "both",
    rate: Annotated[int, typer.Option(help="Requests per key and minute; 0 is any number.")] = 0,
    concurrent: Annotated[int, typer.Option(help="Requests per key at a time; 0 is any number.")] = 0,
    drain: Annotated[float, typer.Option(help="Seconds that running answers get after SIGTERM.")] = 30.0,
    also: Annotated[list[Path], typer.Option(metavar="MODEL", help="One more model; repeatable.")] = [],  # noqa: B006
    page: Annotated[bool, typer.Option(help="Show the web page at /.")] = True,
    runs: Annotated[Path, typer.Option(help="Folder of the run folders that the page shows.")] = Path("runs"),
) -> None:
    """Serve a model with OpenAI's and DeepSeek's API, on this machine alone unless told otherwise."""
    _check_dtype(dtype)
    for option, value in (("--rows", rows), ("--chunk", chunk), ("--tokens", 1 if tokens is None else tokens)):
        if value < 1:
            raise UserError(option, value, "not above 0", "Use 1 or more.")
    if queue < 0:
        raise UserError("--queue", queue, "negative", "Use 0 to let nobody wait.")
    from finback.checkpoint.model import find_model
    from finback.serve import server

    found = find_model(model)
    own = name or model.resolve().name
    others = {path.resolve().name: path for path in also}
    if len(others) < len(also) or {own, *alias} & set(others):
        raise UserError("--also", [str(p) for p in also], "two models of one name", "Call the first with --name.")
    server.run(
        found,
        host=host,
        port=port,
        name=own,
        aliases=alias,
        dtype=dtype,  # type: ignore[arg-type]
        rows=rows,
        tokens=tokens,
        chunk=chunk,
        queue=queue,
        reuse=reuse,
        speculate=speculate,
        key_file=key_file,
        insecure=insecure,
        keys=_keys(),
        hosts=allow_host,
        origins=allow_origin,
        reasoning_field=reasoning,
        rate=rate,
        concurrent=concurrent,
        drain=drain,
        page=page,
        also={label: find_model(path) for label, path in others.items()},
        runs=runs,
        planned=_planned,
    )


@app.command()
def watch(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="A folder of run folders, or one run folder.")] = Path(
        "runs"
    ),
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Which port; 0 is any that is free.")] = 8001,
    show: Annotated[bool, typer.Option("--open", help="Open a browser at the page.")] = False,
    key_file: KeyFile = None,
    insecure: Insecure = False,
    allow_host: AllowHost = [],  # noqa: B006
) -> None:
    """Watch runs in a browser: stages, curves, and what the model says as it learns. Reads run folders only."""
    from finback.serve import watch as page

    page.run(
        runs,
        host=host,
        port=port,
        key_file=key_file,
        insecure=insecure,
        hosts=allow_host,
        show=show,
        keys=_keys(),
        planned=_planned,
    )


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A Hugging Face folder or a .gguf file.")],
    against: Annotated[
        Path | None, typer.Option(metavar="FOLDER2", help="Compare logits with this checkpoint too.")
    ] = None,
    max_kl: Annotated[float, typer.Option(help="Mean KL divergence of logits that still counts as equal.")] = 1e-4,
    out: Annotated[Path | None, typer.Option(help="Where the card goes; default FOLDER/VERIFICATION.md.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as one JSON object.")] = False,
) -> None:
    """Check a checkpoint against its config, its closed form and transformers; exit code 1 unless all holds."""
    from finback.report import verify as report

    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UserError("--out", str(out), "not a file in a folder that exists", "Name a file.")
    card = report.verify(folder, against, max_kl)
    print(json.dumps(card.as_json()) if as_json else card.as_text(), end="\n" if as_json else "")
    target = out or (folder / "VERIFICATION.md" if folder.is_dir() else Path(f"{folder}.VERIFICATION.md"))
    try:
        report.write(card, target)
    except OSError as error:
        if out is not None:
            raise
        print(f"the card was not written to {target}: {error.strerror}; name a place with --out", file=sys.stderr)
    if not card.holds:
        raise typer.Exit(1)


@app.command(cls=comparing.Spread)
def compare(
    models: comparing.Models = None,
    tasks: comparing.Tasks = [],  # noqa: B006
    endpoint: comparing.Endpoints = [],  # noqa: B006
    problems: comparing.Problems = None,
    samples: comparing.Samples = None,
    temperature: comparing.Temperature = 0.6,
    top_p: comparing.TopP = 0.95,
    max_tokens: comparing.MaxTokens = 32768,
    seed: comparing.Seed = 0,
    think: comparing.Think = None,
    out: comparing.Out = Path("compare"),
    price_in: comparing.PriceIn = [],  # noqa: B006
    price_out: comparing.PriceOut = [],  # noqa: B006
    price_hour: comparing.PriceHour = None,
    key_env: comparing.KeyEnv = [],  # noqa: B006
    extra: comparing.Extra = "",
    concurrency: comparing.Concurrency = 8,
    rate: comparing.Rate = 0.0,
    timeout: comparing.Timeout = 300.0,
    rows: comparing.Rows = 32,
    dtype: Dtype = "auto",
    harness: comparing.Harness = "",
    harness_python: comparing.HarnessPython = None,
    harness_chat: comparing.HarnessChat = False,
    published: comparing.Published = False,
    contamination: comparing.Contamination = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Ask models the same questions: scores with intervals, what can be told apart, and what an answer costs.

    Answers are kept in --out, and the same command asks only what is missing. Exit code 1 if requests failed for good.
    """
    from finback.comparison import command

    _check_dtype(dtype)
    options = command.Options(
        tuple(models or ()),
        tuple(endpoint),
        tuple(tasks),
        problems,
        out,
        tuple(price_in),
        tuple(price_out),
        price_hour,
        tuple(key_env),
        extra,
        concurrency,
        rate,
        timeout,
        rows,
        dtype,
        harness,
        harness_python,
        harness_chat,
        published,
        tuple(contamination),
    )
    rules = command.protocol(samples, temperature, top_p=top_p, max_tokens=max_tokens, seed=seed, think=think)
    if not tasks and published:
        report, text, complete = command.run(options, rules, os.environ)
    else:
        prepare_folder(out)
        with locked(out):
            report, text, complete = command.run(options, rules, os.environ)
    print(json.dumps(report, ensure_ascii=False) if as_json else text)
    if not complete:
        print("some requests failed; the same command asks them again", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def export(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A run, a stage, a Hugging Face folder or a .gguf file.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp32, or fp8 (DeepSeek's 128 x 128 blocks).")] = "bf16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Write a model as a Hugging Face folder for transformers, vLLM and others; the folder appears when complete."""
    if dtype not in ("bf16", "fp32", "fp8"):
        raise UserError("--dtype", dtype, "not a format", "Use bf16, fp32 or fp8.")
    from finback.report.export import export_model

    files = export_model(model, folder, dtype)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps({"folder": str(folder), "files": {f.name: f.stat().st_size for f in files}}))
    else:
        size = sum(f.stat().st_size for f in files)
        print(f"{folder}: {len(files)} files, {size / 1e6:,.1f} MB. Check them with `finback verify {folder}`.")


@app.command()
def docs(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A finished run folder such as runs/tiny.")] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder; default RUN/documents.")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="What only people know; default RUN/answers.toml, if it is there.")
    ] = None,
    model: Annotated[str, typer.Option(help="The stage whose model is published; default the last.")] = "",
    check: Annotated[bool, typer.Option("--check", help="Only say what is missing; exit code 1 then.")] = False,
    questions: Annotated[bool, typer.Option("--questions", help="Print an answers file to fill in.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Write what a model's maker owes the public, from a run's records: report, card, EU forms, bills of materials."""
    from datetime import UTC, datetime

    from finback.report.docs import build, facts
    from finback.report.docs import questionnaire as asked

    if questions:
        print(asked.template(), end="")
        return
    if run is None:
        raise UserError("run", "", "nothing to document", "Name a run folder, or give --questions.")
    found = facts.read(run, model)
    path = answers or run / "answers.toml"
    given = asked.read(path) if answers is not None or path.is_file() else asked.Answers({})
    now = datetime.now(UTC)
    examined = build.examine(found, given, now)
    files = [] if check else build.write(found, given, out or run / "documents", now)
    if as_json:
        print(
            json.dumps(
                {"files": [str(f) for f in files], **vars(examined), "complete": examined.holds}, ensure_ascii=False
            )
        )
    else:
        print(examined.as_text() if check else build.outcome(files, examined))
    if check and not examined.holds:
        raise typer.Exit(1)


@app.command()
def track(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder such as runs/tiny.")],
    to: Annotated[str, typer.Option(help="tensorboard, trackio or wandb (offline).")] = "tensorboard",
    out: Annotated[Path, typer.Option(help="Folder for what the viewer reads.")] = Path("tracked"),
    follow: Annotated[bool, typer.Option("--follow", help="Wait for more until the run is over.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Send a run's curves to another viewer, while it goes on or afterwards."""
    from finback.report import track as report

    viewers = get_args(report.Viewer)
    if to not in viewers:
        raise UserError("--to", to, "no such viewer", did_you_mean(to, viewers))
    sent = report.track(run, to, out, follow)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps({"to": to, "lines": sent}))
    else:
        print(f"{sum(sent.values()):,} lines of {len(sent)} stages sent to {to}")
        if to == "tensorboard":
            print(f"Look at them: tensorboard --logdir {out}")


def _planned(root: Path) -> dict[str, dict[str, float]]:
    """What a run's stages were to take, for the page."""
    from finback.planner import calibration_file, plan_vs_actual

    return plan_vs_actual.planned(root, calibration_file.default_path(os.environ))


def _keys() -> list[str]:
    """The API key that the environment gives, if any."""
    return [key for key in (os.environ.get("FINBACK_API_KEY"),) if key]


def _check_dtype(dtype: str) -> None:
    if dtype not in ("auto", "fp32", "bf16", "int8"):
        raise UserError("--dtype", dtype, "not a format", "Use auto, fp32, bf16 or int8.")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
