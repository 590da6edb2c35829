"""The options of `finback chat`. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from finback.options import Dtype, Options


@dataclass(frozen=True, kw_only=True)
class ChatOptions(Options):
    """Who is talked to, and how it answers; None leaves a field of SamplingParams to the model's own settings."""

    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A run, a stage's folder, a Hugging Face folder or a .gguf file.")
    ]
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; default the model's own setting, else 0.7.")
    ] = None
    top_p: Annotated[float | None, typer.Option(help="Likeliest tokens up to this probability.")] = None
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")] = None
    min_p: Annotated[float | None, typer.Option(help="Only tokens this likely against the likeliest.")] = None
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest reply; default an eighth of the window, 1024 at most.")
    ] = None
    seed: Annotated[int, typer.Option(help="Same seed, same replies.")] = 0
    dtype: Dtype = "auto"

    def sampling(self) -> dict[str, float | None]:
        """The fields of SamplingParams."""
        return {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens")}
