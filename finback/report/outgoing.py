"""A model out of finback: weights, config, tokenizer, generation settings and card in one new folder."""

from pathlib import Path

from finback.checkpoint import export as weights
from finback.checkpoint import model as models
from finback.checkpoint.export import Format
from finback.data.tokenizer import Tokenizer
from finback.report.card import write_card
from finback.report.talk import find_model


def export(path: Path, folder: Path, fmt: Format) -> list[Path]:
    """Export the model at `path` (a run: its newest); the files written. A model without tokenizer goes without."""
    source = find_model(path)
    model = models.load(source)

    def extras(part: Path) -> None:
        if source.suffix == ".gguf" or (source / "tokenizer.json").is_file():
            Tokenizer(source).export(part)
        card = write_card(model.config, folder.name, str(source), fmt)
        (part / "README.md").write_text(card, encoding="utf-8")

    return weights.export(model, folder, fmt, extras)
