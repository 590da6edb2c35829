"""Exports a model as a GGUF file for llama.cpp and Ollama, with a Modelfile for Ollama."""

from pathlib import Path

from finback.checkpoint import gguf_export, models
from finback.checkpoint.gguf_types import GgufType
from finback.checkpoint.models import find_model
from finback.config import UserError
from finback.data.gguf_vocabulary import keys
from finback.data.template import OWN, Template
from finback.data.tokenizer import Tokenizer
from finback.report.tokenizer_parity import texts


def export_gguf(path: Path, file: Path, kind: GgufType) -> list[Path]:
    """Exports the model at `path` (for a run, its newest). Returns the file and its Modelfile.

    UserError unless the vocabulary in the file tokenizes 1,000 texts exactly as in training.
    """
    if file.exists():
        raise UserError("FOLDER", str(file), "exists", "Give a new file.")
    file.parent.mkdir(parents=True, exist_ok=True)
    source = find_model(path)
    model, tokenizer = models.load(source).eval(), Tokenizer(source)
    gguf_export.write(model, file, kind, keys(tokenizer, model.config.vocab_size, file.stem))
    if text := _differs(tokenizer, Tokenizer(file)):
        file.unlink()
        problem = f"llama.cpp would give {text!r} other ids than in training"
        raise UserError("--format", "gguf", problem, "Export a Hugging Face folder.")
    modelfile = file.with_name(f"{file.stem}.Modelfile")
    modelfile.write_text(_modelfile(tokenizer, file), encoding="utf-8")
    return [file, modelfile]


def _differs(ours: Tokenizer, written: Tokenizer) -> str:
    """The first of a thousand texts with different ids; "" if there is none."""
    for text in texts([mark for mark in ours.added if mark.strip()]):
        if ours.encode(text) != written.encode(text) or ours.encode_marked(text) != written.encode_marked(text):
            return text
    return ""


def _modelfile(tokenizer: Tokenizer, file: Path) -> str:
    """Ollama's Modelfile: the file, stop strings, and the prompt template as far as it can be derived."""
    lines = [f"FROM ./{file.name}"]
    if template := _go_template(tokenizer):
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {quoted(text)}" for text in _stop_texts(tokenizer)]
    for name in ("temperature", "top_p", "top_k", "min_p"):
        if isinstance(value := tokenizer.generation.get(name), int | float):
            lines.append(f"PARAMETER {name} {value}")
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A value of a Modelfile, which has no escapes: text with quotes or line breaks gets three quotes on each side."""
    mark = '"""' if set(text) & {'"', "\n", "\r"} else '"'
    return f"{mark}{text}{mark}"


def _stop_texts(tokenizer: Tokenizer) -> list[str]:
    return [text for n in tokenizer.stops if (text := tokenizer.decode([n], skip_special=False))]


def _go_template(tokenizer: Tokenizer) -> str:
    """The chat template in Ollama's Go template language, derived from how it renders a system message, a question and an answer.

    "" if there is no template, or if it treats turns in a way that cannot be expressed.
    """
    template = tokenizer.template or (Template(OWN, tokenizer.specials) if tokenizer.writes_own_form else None)
    if template is None:
        return ""
    system, asked, answer = "finback-system", "finback-question", "finback-answer"
    turns = [{"role": "system", "content": system}, {"role": "user", "content": asked}]
    try:
        plain = template.render(turns[1:], add_generation_prompt=True)
        whole = template.render(turns, add_generation_prompt=True)
        ended = template.render([*turns[1:], {"role": "assistant", "content": answer}], add_generation_prompt=False)
    except UserError:
        return ""
    bos = tokenizer.specials.get("bos_token", "")  # added by the file's settings
    before, found, after = plain.removeprefix(bos).partition(asked)
    opening, has_system, rest = whole.removeprefix(bos).partition(system)
    between, _, _ = rest.partition(asked)
    if not (found and has_system and between.endswith(before)):
        return ""
    closing = ended.rpartition(answer)[2] if answer in ended else ""
    between = between.removesuffix(before)
    return (
        f"{{{{ if .System }}}}{opening}{{{{ .System }}}}{between}{{{{ end }}}}"
        f"{{{{ if .Prompt }}}}{before}{{{{ .Prompt }}}}{{{{ end }}}}{after}{{{{ .Response }}}}{closing}"
    )
