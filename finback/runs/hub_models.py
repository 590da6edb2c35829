"""Models of the Hugging Face hub by name: which texts are names, and fetching the files. Does not import torch.

    org/model                 its config, weights and tokenizer
    org/model@revision        the same at a branch, a tag or a commit
    org/model/file.gguf       one file of it

An existing local path takes precedence; hub:org/model always means the hub. Downloading, resuming and caching are done by huggingface_hub, so
files fetched by transformers, vLLM or `hf download` are reused; HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from finback.config import UserError
from finback.extras import how_to_install
from finback.runs.files import is_gguf

_WORD = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(
    rf"(?P<forced>hub:)?(?P<repo>(?P<owner>{_WORD})/{_WORD}?)(?:@(?P<revision>[\w./-]+?))?(?:/(?P<file>[^@]+\.gguf))?",
    re.I,
)
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")  # a repository's folder in the cache
_SPLIT = re.compile(r"-\d{5}-of-(\d{5}\.gguf)", re.I)
# files that a model's folder is read from; no code, no weights in other formats, no subfolders
MODEL = (
    *("*.json", "*.jinja", "model*.safetensors", "adapter_model.safetensors", "tokenizer.model", "tiktoken.model"),
    *("merges.txt", "vocab.txt"),
)
_ELSEWHERE = ("*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt")
CONFIGS = ("config.json", "model.json", "adapter_config.json")


def is_name(path: Path) -> bool:
    """Whether a nonexistent path may be a hub model; if its first part is a local folder, it is a path."""
    found = _NAME.fullmatch(str(path))
    if found is None or path.exists():
        return False
    if found["forced"]:
        return True
    if Path(found["owner"]).exists():
        return False
    return bool(found["file"]) or not is_gguf(path)


def fetched(path: Path, revision: str = "", wanted: Sequence[str] = MODEL) -> Path:
    """The local path of a named model, downloaded if necessary; any other path unchanged.

    `revision` overrides that of the name. UserError if neither hub nor cache has it.
    """
    if not is_name(path):
        return path
    found = _NAME.fullmatch(str(path))
    assert found is not None, "a name"
    repo, revision, file = found["repo"], revision or found["revision"] or "", found["file"] or ""
    patterns, ignored = (_parts(file), ()) if file else (tuple(wanted), _ELSEWHERE)
    snapshot = _download(path, repo, revision, patterns, ignored)
    if file and not (snapshot / file).is_file():
        raise UserError("model", str(path), f"{repo} has no file {file}", "Check its files on the hub.")
    return snapshot / file


def commit(folder: Path) -> str:
    """The commit of a folder, or of a file in it, in the hub's cache."""
    parts = folder.parts
    return parts[parts.index("snapshots") + 1]


def model_name(path: Path) -> str:
    """A model's display name: its repository's name if it is the hub's or cached, else the last part of its path."""
    if is_name(path) and (found := _NAME.fullmatch(str(path))):
        return Path(found["file"] or found["repo"]).name
    if is_gguf(path) and path.suffix:  # in the cache it links to a file named by its digest
        return path.name
    resolved = path.resolve()
    for part in reversed((*path.absolute().parts, *resolved.parts)):
        if cached := _CACHED.fullmatch(part):
            return cached["name"]
    return resolved.name


def _parts(file: str) -> tuple[str, ...]:
    """Patterns for a GGUF file and, if it is the first of several parts, the others."""
    plain = re.sub(r"([\[?*])", r"[\1]", file)
    return (_SPLIT.sub(r"-*-of-\1", plain),)


def _download(path: Path, repo: str, revision: str, wanted: Sequence[str], ignored: Sequence[str]) -> Path:
    """The snapshot of a repository; no request is made if the cache has all files of a commit."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        problem = "no such file or folder, and models of the hub need a package"
        raise UserError("model", str(path), problem, how_to_install("huggingface-hub>=1")) from None
    page = f"https://huggingface.co/{repo}"
    try:
        return Path(
            snapshot_download(
                repo, revision=revision or None, allow_patterns=list(wanted), ignore_patterns=list(ignored)
            )
        )
    except errors.GatedRepoError:
        problem = f"{repo} is gated: only accounts that have accepted its terms can download it"
        remedy = f"Accept them on {page}, and log in: `hf auth login`."
    except errors.RepositoryNotFoundError:
        problem = f"no such file or folder, and the hub has no model {repo} for you"
        remedy = "Check the path or the name; a private model needs `hf auth login`."
    except errors.RevisionNotFoundError:
        problem = f"{repo} has no revision {revision!r}"
        remedy = f"Its branches, tags and commits are on {page}/tree/main."
    except errors.LocalEntryNotFoundError as error:  # no connection, and not completely cached
        problem = f"no such file or folder, and the hub cannot be reached for {repo}: {_first_line(error)}"
        remedy = "Check the path, or go online once; fetched files stay in the cache."
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        problem = f"the download from the hub failed: {_first_line(error)}"
        remedy = "Run the command again: downloaded files are reused."
    raise UserError("model", str(path), problem, remedy)


def _first_line(error: Exception) -> str:
    """The first line of an error's message."""
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
