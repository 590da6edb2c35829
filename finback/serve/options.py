"""The options of `finback serve` and `finback watch`, and the server's limits. Sizes are bytes, times are seconds.

No torch here.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from finback.config import UserError, check_not_negative, check_positive
from finback.options import Dtype, Options
from finback.runs.adapters import CONFIG_FILE, is_adapter
from finback.runs.hub_models import fetched, model_name

# where a response has the chain of thought: in reasoning_content, in reasoning, in both, in the content, or nowhere
ReasoningField = Literal["both", "deepseek", "openrouter", "inline", "none"]
# where a chain of thought begins: auto where the prompt or the text opens one; deepseek_r1 always, opened or not; none nowhere
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
    """How a server is reached, and by whom."""

    host: Annotated[str, "Where to listen; other than loopback needs a key."] = "127.0.0.1"
    port: int = 8000
    uds: Annotated[Path | None, "A Unix socket to listen on, in place of host and port."] = None
    ssl_certfile: Annotated[Path | None, "A certificate chain, for https."] = None
    ssl_keyfile: Annotated[Path | None, "Its private key, unless the chain holds it."] = None
    key_file: Annotated[Path | None, "API keys, one a line, or their SHA-256; also FINBACK_API_KEY."] = None
    insecure: Annotated[bool, Option("--insecure", help="Listen beyond loopback without a key.")] = False
    # names in the Host header beside localhost and `host`; "*" allows any
    hosts: Annotated[tuple[str, ...], Option("--allow-host", help="A name the server is reached by; repeatable.")] = ()
    # one more key, which no file holds
    api_key: str = field(default="", repr=False)
    # SHA-256 of each API key, as http.secured reads them; none: open to whoever reaches the server
    keys: tuple[bytes, ...] = ()
    # other sites whose pages may ask, such as https://chat.example.org
    origins: tuple[str, ...] = ()
    # the web page at /, and its files, which need no key; everything that it asks does
    page: bool = True
    # longest request
    body: int = 4 << 20
    # all header names and values together
    headers: int = 16 << 10
    # seconds that a request's head may take, and that its body may pause
    head_timeout: float = 10.0
    body_timeout: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port < 1 << 16:
            raise UserError("--port", self.port, "no port", "Use a number up to 65535; 0 is any that is free.")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise UserError("--ssl-keyfile", str(self.ssl_keyfile), "no certificate", "Give --ssl-certfile as well.")


@dataclass(frozen=True, kw_only=True)
class WatchOptions(ListenOptions):
    """What `finback watch` shows."""

    runs: Annotated[Path, Argument(metavar="RUNS", help="A folder of run folders, or one run folder.")] = Path("runs")
    port: Annotated[int, "Which port; 0 is any that is free."] = 8001
    show: Annotated[bool, Option("--open", help="Open a browser at the page.")] = False


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ListenOptions):
    """What a server answers with, and how much it takes on."""

    model: Annotated[
        Path | None,
        Argument(metavar="MODEL", help="A run, a stage, a Hugging Face folder, a .gguf file or org/model of the hub."),
    ] = None
    port: Annotated[int, "Which port."] = 8000
    name: Annotated[str, "What requests call the model; default its folder."] = ""
    aliases: Annotated[tuple[str, ...], Option("--alias", help="Another name for it; repeatable.")] = ()
    dtype: Dtype = "auto"
    rows: Annotated[int, "Answers made at a time."] = 32
    tokens: Annotated[int | None, "Tokens the cache holds; default what a quarter of the free memory does."] = None
    chunk: Annotated[int, "Prompt tokens read between two steps of the others."] = 256
    queue: Annotated[
        int | None, Option(parser=_number_or_none, metavar="N|none", help="Answers that may wait; beyond, 503.")
    ] = 64
    reuse: Annotated[bool, "Read the beginnings that prompts share once."] = True
    speculate: Annotated[bool, "Draft with the model's MTP module, if it has one."] = True
    origins: Annotated[tuple[str, ...], Option("--allow-origin", help="A site whose pages may ask; repeatable.")] = ()
    reasoning: Annotated[ReasoningField, "Where chains go: both, deepseek, openrouter, inline or none."] = "both"
    reasoning_parser: Annotated[
        ReasoningParser, "Which text is a chain: auto, deepseek_r1 (all before </think>), none."
    ] = "auto"
    rate: Annotated[int, "Requests per key and minute; 0 is any number."] = 0
    concurrent: Annotated[int, "Requests per key at a time; 0 is any number."] = 0
    drain: Annotated[float, "Seconds that running answers get after SIGTERM."] = 30.0
    also: Annotated[tuple[Path, ...], Option(metavar="MODEL", help="One more model; repeatable.")] = ()
    models_dir: Annotated[
        Path | None, "A folder of models, each read when a request names it; without MODEL the first is read at once."
    ] = None
    models_max: Annotated[int, "Of them at a time; the least used leaves."] = 4
    lora: Annotated[
        tuple[str, ...],
        Option("--adapter", metavar="NAME=FOLDER", help="An adapter of the model, by name; repeatable."),
    ] = ()
    page: Annotated[bool, "Show the web page at /."] = True
    return_routed_experts: Annotated[
        bool, Option("--enable-return-routed-experts", help="Note each token's experts for /inference/v1/generate.")
    ] = False
    allow_weight_updates: Annotated[
        Path | None, Option(metavar="FOLDER", help="Take other weights from within it while running, when asked.")
    ] = None
    engine: Annotated[
        Literal["finback", "vllm", "sglang"], "What makes the tokens: this process, or a program behind it."
    ] = "finback"
    replicas: Annotated[int, "Programs to start; a prompt goes where its beginning was read."] = 1
    engine_python: Annotated[
        str, Option(metavar="PYTHON", help="Of the environment that the program is installed in.")
    ] = ""
    engine_flags: Annotated[
        tuple[str, ...],
        Option("--engine-flag", metavar="FLAG", help="For the program, as --engine-flag=--x=1; repeatable."),
    ] = ()
    engine_env: Annotated[
        tuple[str, ...], Option("--engine-env", metavar="NAME=VALUE", help="In its environment; repeatable.")
    ] = ()
    upstream: Annotated[
        tuple[str, ...],
        Option("--upstream", metavar="URL", help="One that runs already, in place of starting any; repeatable."),
    ] = ()
    runs: Annotated[Path, "Folder of the run folders that the page shows."] = Path("runs")
    # prompts x n of one request
    choices: int = 64
    # silence in a stream after which a comment is sent
    keep_alive: float = 15.0
    # how long a resumable stream waits for its reader to come back
    resume_timeout: float = 20.0
    # most that is stored of it
    resume_bytes: int = 8 << 20
    # work without a step for this long: not ready
    stalled: float = 30.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or (model_name(Path(self.model)) if self.model else ""))
        super().__post_init__()
        check_positive(self, "--", "rows", "chunk", "tokens", "models_max", "replicas")
        self._check_engine()
        if self.models_dir is not None and not self.models_dir.is_dir():
            raise UserError("--models-dir", str(self.models_dir), "no folder", "Name one that holds models.")
        check_not_negative(self, "--", "queue", "rate", "concurrent", "drain")
        taken = {self.name, *self.aliases}
        if len(self.others) < len(self.also) or taken & set(self.others):
            others = list(map(str, self.also))
            raise UserError("--also", others, "two models of one name", "Call the first with --name.")
        taken |= set(self.others)
        for text in self.lora:
            name, folder = _named(text)
            if name in taken:
                raise UserError("--adapter", text, f"something else is called {name} already", "Call it otherwise.")
            if not is_adapter(folder):
                remedy = "Name a folder that PEFT or a stage with an adapter has written."
                raise UserError("--adapter", text, f"{folder} holds no {CONFIG_FILE}", remedy)
            taken.add(name)

    def _check_engine(self) -> None:
        """UserError for what only one kind of engine has."""
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
            problem = f"{self.engine} lives in an environment of its own"
            raise UserError(
                "--engine-python", "", problem, "Name the Python that it is installed in, or an --upstream."
            )

    @property
    def others(self) -> dict[str, Path]:
        """The models beside the first by name."""
        return {model_name(path): path for path in self.also}

    @property
    def adapters(self) -> dict[str, Path]:
        """The folders of the first model's adapters by name."""
        return dict(map(_named, self.lora))


def _named(text: str) -> tuple[str, Path]:
    """NAME=FOLDER -> both."""
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise UserError("--adapter", text, "not NAME=FOLDER", "Write it as in --adapter sums=runs/lora/rl.")
    return name, fetched(Path(folder))
