"""The options of chat, verify, export, docs and track. Does not import torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from finback.config import UserError
from finback.options import Dtype, Options
from finback.runs.hub_models import is_name, model_name


@dataclass(frozen=True, kw_only=True)
class ChatOptions(Options):
    """The model to chat with, and its sampling; None leaves a field of SamplingParams to the model's settings."""

    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A run, a stage's folder, a Hugging Face folder, a .gguf file or org/model of the hub.",
        ),
    ]
    temperature: Annotated[float | None, typer.Option(help="0: greedy; default: the model's setting, else 0.7.")] = None
    top_p: Annotated[float | None, typer.Option(help="Likeliest tokens up to this probability.")] = None
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")] = None
    min_p: Annotated[float | None, typer.Option(help="Only tokens at least this likely relative to the likeliest.")] = (
        None
    )
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest reply in tokens; default: an eighth of the window, at most 1024.")
    ] = None
    seed: Annotated[int, typer.Option(help="Same seed, same replies.")] = 0
    dtype: Dtype = "auto"
    resume: Annotated[bool, typer.Option("--continue", help="Continue the last dialogue with this model.")] = False
    # where dialogues are stored for --continue; None: nowhere
    kept: Path | None = None

    def sampling(self) -> dict[str, float | None]:
        """The fields of SamplingParams."""
        return {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens")}


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """What is verified, and against what."""

    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A Hugging Face folder, a .gguf file or org/model of the hub.")
    ]
    against: Annotated[
        Path | None, typer.Option(metavar="FOLDER2", help="Compare logits with this checkpoint too.")
    ] = None
    max_kl: Annotated[float, typer.Option(help="Largest mean KL divergence of logits that counts as equal.")] = 1e-4
    out: Annotated[Path | None, typer.Option(help="File for the card; default: FOLDER/VERIFICATION.md.")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None and (self.out.is_dir() or not self.out.parent.is_dir()):
            raise UserError("--out", str(self.out), "not a file in a folder that exists", "Give a file.")

    @property
    def card(self) -> Path:
        """Path of the card."""
        place = model_name(self.folder) if is_name(self.folder) else self.folder
        beside = self.folder / "VERIFICATION.md" if self.folder.is_dir() else Path(f"{place}.VERIFICATION.md")
        return self.out or beside


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Which model to export, where, and in which format."""

    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A run, a stage, a Hugging Face folder, a .gguf file or org/model of the hub."
        ),
    ]
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder, or a new .gguf file.")]
    dtype: Annotated[
        Literal["bf16", "fp32", "fp8"], typer.Option(help="bf16, fp32, or fp8 (DeepSeek's 128 x 128 blocks).")
    ] = "bf16"
    format: Annotated[
        Literal["hf", "gguf"], typer.Option(help="A Hugging Face folder, or a file for llama.cpp and Ollama.")
    ] = "hf"
    type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_0", "q4_0", "q4_k_m"],
        typer.Option(help="Storage type of matrices in a GGUF file."),
    ] = "f16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format == "gguf" and self.folder.suffix != ".gguf":
            raise UserError("FOLDER", str(self.folder), "not a name for a GGUF file", f"Use {self.folder}.gguf.")


@dataclass(frozen=True, kw_only=True)
class DocsOptions(Options):
    """Which run to document, and people's additions."""

    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A finished run folder such as runs/tiny.")] = None
    out: Annotated[Path | None, typer.Option(help="A new folder; default: RUN/documents.")] = None
    answers: Annotated[
        Path | None, typer.Option(help="Answers that only people know; default: RUN/answers.toml, if it exists.")
    ] = None
    model: Annotated[str, typer.Option(help="The stage whose model is published; default: the last.")] = ""
    check: Annotated[bool, typer.Option("--check", help="Only list what is missing; exit code 1 if anything is.")] = (
        False
    )
    questions: Annotated[bool, typer.Option("--questions", help="Print a template for the answers file.")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run is None and not self.questions:
            raise UserError("run", "", "nothing to document", "Give a run folder, or --questions.")


@dataclass(frozen=True, kw_only=True)
class TrackOptions(Options):
    """Which run to send to which viewer."""

    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder such as runs/tiny.")]
    to: Annotated[
        Literal["tensorboard", "trackio", "wandb"], typer.Option(help="tensorboard, trackio or wandb (offline).")
    ] = "tensorboard"
    out: Annotated[Path, typer.Option(help="Folder for the viewer's files.")] = Path("tracked")
    follow: Annotated[bool, typer.Option("--follow", help="Keep sending until the run is over.")] = False
