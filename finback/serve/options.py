"""The options of `finback serve` and `finback watch`, and the server's limits. Sizes in bytes, times in seconds.

Does not import torch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from finback.config import UserError, check_not_negative, check_positive
from finback.engine.speculate import Drafting
from finback.options import Dtype, EngineEnv, EngineFlags, EnginePython, Options
from finback.runs.adapters import CONFIG_FILE, is_adapter
from finback.runs.hub_models import fetched, model_name

# fields of a response for the chain of thought: reasoning_content, reasoning, both, inside the content, or none
ReasoningField = Literal["both", "deepseek", "openrouter", "inline", "none"]
# start of a chain of thought: auto: if the prompt or the text opens one; deepseek_r1: always, opened or not; none: never
ReasoningParser = Literal["auto", "deepseek_r1", "none"]
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _number_or_none(text: str) -> int | None:
    """A number, or none for no limit."""
    if str(text).lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither a number nor none") from None


@dataclass(frozen=True, kw_only=True)
class ListenOptions(Options):
    """The address of a server, and who may use it."""

    host: Annotated[str, "Address to listen on; any but loopback needs a key."] = "127.0.0.1"
    port: int = 8000
    uds: Annotated[Path | None, "A Unix socket to listen on instead of host and port."] = None
    ssl_certfile: Annotated[Path | None, "A certificate chain, for https."] = None
    ssl_keyfile: Annotated[Path | None, "The certificate's private key, unless the chain contains it."] = None
    key_file: Annotated[Path | None, "File of API keys or their SHA-256, one per line; see also FINBACK_API_KEY."] = (
        None
    )
    insecure: Annotated[bool, Option("--insecure", help="Allow listening beyond loopback without a key.")] = False
    # allowed names in the Host header besides localhost and `host`; "*": any
    hosts: Annotated[tuple[str, ...], Option("--allow-host", help="A host name of the server; repeatable.")] = ()
    # one more key, which is not in a file
    api_key: str = field(default="", repr=False)
    # SHA-256 of each API key, as http.secured reads them; (): no key needed
    keys: tuple[bytes, ...] = ()
    # other sites whose pages may send requests, such as https://chat.example.org
    origins: tuple[str, ...] = ()
    # serve the web page at / and its files, which need no key; its requests do
    page: bool = True
    # longest request body
    body: int = 4 << 20
    # longest headers, names and values together
    headers: int = 16 << 10
    # timeout of a request's headers, and of a pause in its body
    head_timeout: float = 10.0
    body_timeout: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port < 1 << 16:
            raise UserError("--port", self.port, "not a port", "Use a number up to 65535; 0: any free port.")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise UserError("--ssl-keyfile", str(self.ssl_keyfile), "no certificate", "Give --ssl-certfile as well.")


@dataclass(frozen=True, kw_only=True)
class WatchOptions(ListenOptions):
    """The options of `finback watch`."""

    runs: Annotated[Path, Argument(metavar="RUNS", help="A folder of run folders, or one run folder.")] = Path("runs")
    port: Annotated[int, "Port; 0: any free port."] = 8001
    show: Annotated[bool, Option("--open", help="Open a browser at the page.")] = False


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ListenOptions):
    """The options of `finback serve`."""

    model: Annotated[
        Path | None,
        Argument(metavar="MODEL", help="A run, a stage, a Hugging Face folder, a .gguf file or org/model of the hub."),
    ] = None
    port: Annotated[int, "Port."] = 8000
    name: Annotated[str, "The model's name in requests; default: its folder's name."] = ""
    aliases: Annotated[tuple[str, ...], Option("--alias", help="Another name of the model; repeatable.")] = ()
    dtype: Dtype = "auto"
    rows: Annotated[int, "Answers generated at a time."] = 32
    tokens: Annotated[int | None, "Size of the cache in tokens; default: a quarter of the free memory."] = None
    chunk: Annotated[int, "Prompt tokens read between two decoding steps."] = 256
    queue: Annotated[
        int | None,
        Option(parser=_number_or_none, metavar="N|none", help="Answers that may wait; more are refused with 503."),
    ] = 64
    reuse: Annotated[bool, "Cache common prefixes of prompts."] = True
    speculate: Annotated[bool, "Draft tokens in steps where measurements show a gain."] = True
    draft: Annotated[
        Drafting, "Source of drafts: mtp (the model's module, if any) or ngram (what followed the same tokens before)."
    ] = "mtp"
    origins: Annotated[
        tuple[str, ...], Option("--allow-origin", help="A site whose pages may send requests; repeatable.")
    ] = ()
    reasoning: Annotated[
        ReasoningField, "Field for the chain of thought: both, deepseek, openrouter, inline or none."
    ] = "both"
    reasoning_parser: Annotated[
        ReasoningParser, "What counts as chain of thought: auto, deepseek_r1 (all before </think>), none."
    ] = "auto"
    rate: Annotated[int, "Requests per key and minute; 0: unlimited."] = 0
    concurrent: Annotated[int, "Concurrent requests per key; 0: unlimited."] = 0
    drain: Annotated[float, "Seconds that running answers may take after SIGTERM."] = 30.0
    also: Annotated[tuple[Path, ...], Option(metavar="MODEL", help="One more model; repeatable.")] = ()
    models_dir: Annotated[
        Path | None,
        "A folder of models, each loaded when a request names it; without MODEL the first is loaded at once.",
    ] = None
    models_max: Annotated[int, "Most of these loaded at a time; the least recently used is unloaded."] = 4
    lora: Annotated[
        tuple[str, ...],
        Option("--adapter", metavar="NAME=FOLDER", help="An adapter of the model, by name; repeatable."),
    ] = ()
    page: Annotated[bool, "Show the web page at /."] = True
    return_routed_experts: Annotated[
        bool, Option("--enable-return-routed-experts", help="Return each token's experts from /inference/v1/generate.")
    ] = False
    allow_weight_updates: Annotated[
        Path | None, Option(metavar="FOLDER", help="Allow requests to load other weights from this folder.")
    ] = None
    engine: Annotated[
        Literal["finback", "vllm", "sglang"], "What generates tokens: this process, or an external program."
    ] = "finback"
    replicas: Annotated[int, "Programs to start; a prompt goes to the one that has its prefix cached."] = 1
    engine_python: EnginePython = ""
    engine_flags: EngineFlags = ()
    engine_env: EngineEnv = ()
    upstream: Annotated[
        tuple[str, ...],
        Option("--upstream", metavar="URL", help="A running program to use instead of starting one; repeatable."),
    ] = ()
    runs: Annotated[Path, "Folder of the run folders that the page shows."] = Path("runs")
    # most choices (prompts x n) of one request
    choices: int = 64
    # silence in a stream after which a comment is sent, in seconds
    keep_alive: float = 15.0
    # how long a resumable stream waits for its reader to return, in seconds
    resume_timeout: float = 20.0
    # most bytes stored of a resumable stream
    resume_bytes: int = 8 << 20
    # not ready if there is work but no step ends for this long, in seconds
    stalled: float = 30.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or (model_name(Path(self.model)) if self.model else ""))
        super().__post_init__()
        check_positive(self, "--", "rows", "chunk", "tokens", "models_max", "replicas")
        self._check_engine()
        if self.models_dir is not None and not self.models_dir.is_dir():
            raise UserError("--models-dir", str(self.models_dir), "not a folder", "Give a folder of models.")
        check_not_negative(self, "--", "queue", "rate", "concurrent", "drain")
        taken = {self.name, *self.aliases}
        if len(self.others) < len(self.also) or taken & set(self.others):
            others = list(map(str, self.also))
            raise UserError("--also", others, "two models have the same name", "Call the first with --name.")
        taken |= set(self.others)
        for text in self.lora:
            name, folder = _named(text)
            if name in taken:
                raise UserError("--adapter", text, f"the name {name} is already in use", "Choose another name.")
            if not is_adapter(folder):
                remedy = "Give a folder written by PEFT or by a stage with an adapter."
                raise UserError("--adapter", text, f"{folder} has no {CONFIG_FILE}", remedy)
            taken.add(name)

    def _check_engine(self) -> None:
        """Raises UserError for options that apply to another kind of engine."""
        own, programs = self.engine == "finback", ("engine_python", "engine_flags", "engine_env", "upstream")
        built_in = "also", "models_dir", "lora", "allow_weight_updates", "return_routed_experts", "tokens"
        for name in programs if own else built_in:
            if value := getattr(self, name):
                flag = {"lora": "--adapter", "engine_flags": "--engine-flag"}.get(name, f"--{name.replace('_', '-')}")
                problem = "is for --engine vllm or sglang" if own else "is for finback's own engine"
                raise UserError(flag, str(value), problem, "Leave it out, or change --engine.")
        if own and self.replicas > 1:
            raise UserError("--replicas", self.replicas, "is for --engine vllm or sglang", "Leave it out.")
        if not own and not self.upstream and not self.engine_python:
            problem = f"{self.engine} runs in its own environment"
            raise UserError("--engine-python", "", problem, "Give the Python of that environment, or an --upstream.")

    @property
    def others(self) -> dict[str, Path]:
        """The models besides the first, by name."""
        return {model_name(path): path for path in self.also}

    @property
    def adapters(self) -> dict[str, Path]:
        """The folders of the first model's adapters, by name."""
        return dict(map(_named, self.lora))


def _named(text: str) -> tuple[str, Path]:
    """Splits NAME=FOLDER."""
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise UserError("--adapter", text, "not NAME=FOLDER", "Write it as in --adapter sums=runs/lora/rl.")
    return name, fetched(Path(folder))
