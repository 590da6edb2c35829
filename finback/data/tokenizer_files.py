"""Reads the tokenizer files of a Hugging Face folder and combines them as transformers does.

tokenizer.json has vocabulary and rules. Special tokens, end tokens and templates may be in seven other places; their
precedence is that of `PreTrainedTokenizerBase._from_pretrained` (transformers 5.23).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from finback.config import UserError

CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
OTHER_FORMS = (
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """The contents of a tokenizer's files."""

    # the text of tokenizer.json
    text: str
    # tokenizer_config.json, with special_tokens_map.json, added_tokens.json and the templates in it
    settings: dict[str, Any]
    generation: dict[str, Any]
    # config.json's eos_token_id, used if generation_config.json has none
    config_ends: tuple[int, ...] = ()
    # config.json's model_type, or the architecture of a GGUF file
    family: str = ""


def read(path: Path) -> TokenizerFiles:
    """The files of a folder, or of the folder that contains a tokenizer.json."""
    file = path / "tokenizer.json" if path.is_dir() else path
    folder = file.parent
    if not file.is_file():
        if kept := other_forms(folder):
            problem = f"missing: the folder has its tokenizer only as {', '.join(kept)}"
            remedy = "With sentencepiece or tiktoken installed, `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` creates it."
            raise UserError("tokenizer", str(file), problem, remedy)
        raise UserError("tokenizer", str(file), "no such file", "Run the prepare stage, or use another folder.")
    settings = read_json(folder / CONFIG)
    if "added_tokens_decoder" not in settings:
        _add_legacy(folder, settings)
    add_templates(folder, settings)
    generation = read_json(folder / GENERATION)
    model = read_json(folder / "config.json")
    config_ends = ids(model.get("eos_token_id"))
    if generation.get("eos_token_id") is None and config_ends:
        generation["eos_token_id"] = list(config_ends) if len(config_ends) > 1 else config_ends[0]
    return TokenizerFiles(read_text(file), settings, generation, config_ends, str(model.get("model_type", "")))


def other_forms(folder: Path) -> list[str]:
    """Files of a folder with a tokenizer in a format that finback does not read."""
    return [name for name in OTHER_FORMS if (folder / name).is_file()]


def _add_legacy(folder: Path, settings: dict[str, Any]) -> None:
    """special_tokens_map.json overrides tokenizer_config.json; added_tokens.json becomes `added_tokens_decoder`."""
    for name, value in read_json(folder / "special_tokens_map.json").items():
        if name == "extra_special_tokens" and isinstance(value, list):
            had = settings.get(name) or []
            value = [*had, *(each for each in value if each not in had)]
        settings[name] = value
    special = {content(token) for _, token in _named(settings)}
    found = {
        str(number): {"content": text, "normalized": text not in special, "special": text in special}
        for text, number in read_json(folder / "added_tokens.json").items()
    }
    if found:
        settings["added_tokens_decoder"] = found


def add_templates(folder: Path, settings: dict[str, Any]) -> None:
    """Adds the chat templates in a folder to the settings, overriding existing ones.

    chat_template.json is for processors: it is used only if there is no other, as in vLLM and llama.cpp's converter.
    """
    files = {"default": folder / "chat_template.jinja"}
    files |= {each.stem: each for each in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: read_text(file) for name, file in files.items() if file.is_file()}
    if list(found) == ["default"]:
        settings["chat_template"] = found["default"]
    elif found:
        settings["chat_template"] = [{"name": name, "template": text} for name, text in found.items()]
    elif "chat_template" not in settings and (given := read_json(folder / "chat_template.json").get("chat_template")):
        settings["chat_template"] = given


def templates(settings: dict[str, Any], path: Path) -> tuple[str | None, str | None]:
    """The template for dialogues (the only one, or the default of several), and that for dialogues with tools."""
    given = settings.get("chat_template")
    entries = given if isinstance(given, list) else []
    is_named = all(isinstance(t, dict) and isinstance(t.get("name"), str) for t in entries)
    if isinstance(given, list) and is_named:
        given = {t["name"]: t.get("template") for t in entries}
    named = given if isinstance(given, dict) else {"default": given}
    found = named.get("default"), named.get("tool_use")
    if not is_named or not all(isinstance(text, str | None) for text in found):
        problem = "neither a text nor a list of named texts"
        raise UserError("chat_template", str(path), problem, f"Correct {CONFIG}.")
    return found


def add_tokens(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any], path: Path) -> bool:
    """Adds the tokens that the files define outside tokenizer.json. Returns whether there were any.

    Tokens that the vocabulary lacks get the next free ids, whatever ids the files give.
    """
    decoder = settings.get("added_tokens_decoder") or {}
    try:
        listed = [_token(decoder[number]) for number in sorted(decoder, key=int)]
    except (LookupError, TypeError, ValueError) as error:
        problem = f"not a table of ids and tokens ({error})"
        raise UserError("added_tokens_decoder", str(path), problem, f"Correct {CONFIG}.") from None
    known = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    new = [token for token in listed if repr(token) not in known]
    texts = {token.content for token in (*tokenizer.get_added_tokens_decoder().values(), *new)}
    for name, given in _named(settings):
        text = content(given)
        if text is None and given is not None:
            problem = f"{given!r} is neither a token's text nor an object with it"
            raise UserError(name, str(path), problem, f"Correct {CONFIG} or special_tokens_map.json.")
        if text and text not in texts:
            texts.add(text)
            new.append(_token({**(given if isinstance(given, dict) else {"content": text}), "special": True}))
    if new:
        tokenizer.add_tokens(new)
    return bool(new)


def _named(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Special tokens in the settings with the fields that name them: the usual ones, a model's own, and extra ones."""
    yield from ((name, settings.get(name)) for name in STANDARD)
    own = (name for name in settings if name.endswith("_token") and not name.startswith("add_"))
    yield from ((name, settings[name]) for name in own if name not in STANDARD)
    for field in ("extra_special_tokens", "additional_special_tokens"):
        if extra := settings.get(field):
            listed = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else [{}]
            yield from ((field, token) for token in listed)
            return


def _token(given: dict[str, Any]) -> AddedToken:
    """A token as configs define it; an object without flags gets tokenizers' defaults for its text."""
    flags = {name: bool(given[name]) for name in _FLAGS if name in given}
    return AddedToken(given["content"], **flags)


def content(token: Any) -> str | None:
    """The text of a special token in a config: a string, or an object with it; None for anything else."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def ids(given: Any, field: str = "eos_token_id") -> tuple[int, ...]:
    """Token ids in a config: one, a list, or none; negative ones mean none. UserError for anything else."""
    listed = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in listed):
        problem = "neither a token's id nor a list of them"
        raise UserError(field, given, problem, f"Correct config.json or {GENERATION}.")
    return tuple(n for n in listed if n >= 0)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(path.name, str(path), f"not JSON ({error})", "Download it again, or delete it.") from None
    if not isinstance(found, dict):
        raise UserError(path.name, str(path), "not a JSON object", "Download it again, or delete it.")
    return found


def read_text(path: Path) -> str:
    """A text file; UserError if it is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(path.name, str(path), f"not UTF-8 ({error})", "Download it again.") from None
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise UserError(path.name, str(path), problem, "Change its permissions.") from None
