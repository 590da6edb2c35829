"""External engines behind this server: started next to it, or already running, and combined into one."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from finback.checkpoint import models
from finback.checkpoint.export import export
from finback.checkpoint.models import find_model
from finback.client import Client, RequestFailed
from finback.config import UserError
from finback.data.tokenizer import Tokenizer
from finback.engine.open import stops_of
from finback.parallel import launch
from finback.rollouts.engine_process import STARTING, EngineProcess, EngineProgram
from finback.rollouts.generation_server import TEXTS, object_of, tokenized
from finback.serve.options import ServeOptions
from finback.serve.replicas import KINDS, Replica
from finback.serve.upstream import UpstreamConfig, UpstreamEngine

# flags for the token API and for llguidance, whose grammars finback writes
FLAGS = {
    "vllm": ("--enable-scale-out", "--structured-outputs-config", '{"backend": "guidance"}'),
    "sglang": ("--grammar-backend", "llguidance"),
}
HOST = "127.0.0.1"  # started programs are reachable from this machine only


@contextmanager
def opened(options: ServeOptions) -> Iterator[tuple[UpstreamEngine, Tokenizer]]:
    """The external engines that the options name, as one, for the duration of the context; UserError if one is missing or has another model."""
    assert options.model is not None, "a model is given, or is the first of the folder"
    source = find_model(options.model)
    tokenizer = Tokenizer(source)
    with ExitStack() as stack:
        urls = list(options.upstream) or _started(options, source, stack)
        found = [_replica(url, options.engine) for url in urls]
        for replica, _ in found:
            stack.callback(replica.client.close)
            _check(replica, tokenizer)
        capacity = min(window for _, window in found)
        config = UpstreamConfig(options.rows * len(found))
        yield UpstreamEngine([r for r, _ in found], tokenizer, stops_of(tokenizer), capacity, config), tokenizer


def _started(options: ServeOptions, source: Path, stack: ExitStack) -> list[str]:
    """Addresses of newly started programs, which end with the context or this process; each gets an equal share of the GPUs, or else of the cores."""
    assert options.engine != "finback", "not an external program"
    program = EngineProgram(options.engine, options.engine_python, options.engine_flags, options.engine_env)
    program.check("--engine")
    model, flags = _folder(source, stack), FLAGS[options.engine]
    processes = []
    for number in range(options.replicas):
        port = launch.free_port()
        environment = program.environment(launch.share(number, options.replicas))
        command = program.command(str(model), HOST, port, flags)
        processes.append(EngineProcess(command, environment, f"http://{HOST}:{port}"))
        stack.callback(processes[-1].close)
    for process in processes:
        try:
            process.wait(STARTING)
        except RequestFailed as error:
            raise UserError("--engine", options.engine, f"did not start: {error}", "See its log.") from None
    return [process.url for process in processes]


def _folder(source: Path, stack: ExitStack) -> Path:
    """A folder for the programs: the model's own if it is in Hugging Face format, or its export, for the duration of the context."""
    if not (source / "model.json").is_file():
        return source
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="finback-serve-"))) / source.name
    export(models.load(source), folder, "bf16", Tokenizer(source).export)
    return folder


def _replica(url: str, engine: str) -> tuple[Replica, int]:
    """The replica at an address, and its context length in tokens."""
    root = url.rstrip("/").removesuffix("/v1")
    with Client(root) as client:
        try:
            card = object_of(client.reply("/v1/models"), "data", 0)
            name, window = str(object_of(card, "id")), card.get("max_model_len")
        except RequestFailed as error:
            raise UserError(
                "--upstream", url, f"no {engine} answers: {error}", "Start it, or correct the url."
            ) from None
    if not isinstance(window, int):
        raise UserError("--upstream", url, "does not report its context length", "Use vLLM or SGLang.")
    return KINDS[engine](root, name), window


def _check(replica: Replica, tokenizer: Tokenizer) -> None:
    """Raises UserError if the replica tokenizes differently, which indicates another model."""
    try:
        theirs = [tokenized(replica.client, replica.name, text).get("tokens") for text in TEXTS]
    except RequestFailed:
        return  # it lacks the route; answers with another vocabulary are detected later
    if theirs != [tokenizer.encode(text) for text in TEXTS]:
        remedy = "Serve the same folder there and here."
        raise UserError("--upstream", replica.url, "does not have the tokenizer of the given model", remedy)
