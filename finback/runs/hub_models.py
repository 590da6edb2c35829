"""Models of the Hugging Face hub by their names: which texts are names, and the files behind them. No torch here.

    org/model                 its config, weights and tokenizer
    org/model@revision        the same at a branch, a tag or a commit
    org/model/file.gguf       one file of it

What lies here under such a path is taken first, and hub:org/model is the hub's in any case. Downloading, resuming and the cache are huggingface_hub's, so what
transformers, vLLM or `hf download` have fetched is there already; HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE count.
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
# what a model's folder is read from; neither code, nor weights in other forms, nor files in folders of their own
MODEL = (
    *("*.json", "*.jinja", "model*.safetensors", "adapter_model.safetensors", "tokenizer.model", "tiktoken.model"),
    *("merges.txt", "vocab.txt"),
)
_ELSEWHERE = ("*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt")
CONFIGS = ("config.json", "model.json", "adapter_config.json")


def is_name(path: Path) -> bool:
    """Whether a path that leads nowhere may be a model of the hub; a folder of the first part's name makes it a path."""
    found = _NAME.fullmatch(str(path))
    if found is None or path.exists():
        return False
    if found["forced"]:
        return True
    if Path(found["owner"]).exists():
        return False
    return bool(found["file"]) or not is_gguf(path)


def fetched(path: Path, revision: str = "", wanted: Sequence[str] = MODEL) -> Path:
    """Where the model behind a name lies, downloaded if it has to be; any other path as it is.

    `revision` counts before that of the name. UserError where the hub, and the cache, do not give it.
    """
    if not is_name(path):
        return path
    found = _NAME.fullmatch(str(path))
    assert found is not None, "a name"
    repo, revision, file = found["repo"], revision or found["revision"] or "", found["file"] or ""
    patterns, ignored = (_parts(file), ()) if file else (tuple(wanted), _ELSEWHERE)
    snapshot = _download(path, repo, revision, patterns, ignored)
    if file and not (snapshot / file).is_file():
        raise UserError("model", str(path), f"{repo} has no file {file}", "Look at its files on the hub.")
    return snapshot / file


def commit(folder: Path) -> str:
    """The commit that a folder, or a file in it, of the hub's cache is of."""
    parts = folder.parts
    return parts[parts.index("snapshots") + 1]


def model_name(path: Path) -> str:
    """What a model is called: its repository's name, if it is the hub's or in its cache, else the last part of its path."""
    if is_name(path) and (found := _NAME.fullmatch(str(path))):
        return Path(found["file"] or found["repo"]).name
    if is_gguf(path) and path.suffix:  # in the cache it is a link to something called by its digest
        return path.name
    resolved = path.resolve()
    for part in reversed((*path.absolute().parts, *resolved.parts)):
        if cached := _CACHED.fullmatch(part):
            return cached["name"]
    return resolved.name


def _parts(file: str) -> tuple[str, ...]:
    """A GGUF file, and where it is the first of several, the others; as patterns."""
    plain = re.sub(r"([\[?*])", r"[\1]", file)
    return (_SPLIT.sub(r"-*-of-\1", plain),)


def _download(path: Path, repo: str, revision: str, wanted: Sequence[str], ignored: Sequence[str]) -> Path:
    """The snapshot of a repository; nothing is asked of the hub where the cache has all of a commit."""
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
        problem = f"{repo} is gated: it is given to accounts that have accepted its terms"
        remedy = f"Accept them on {page}, and log in: `hf auth login`."
    except errors.RepositoryNotFoundError:
        problem = f"no such file or folder, and the hub has no model {repo} for you"
        remedy = "Check the path or the name; a private model wants `hf auth login`."
    except errors.RevisionNotFoundError:
        problem = f"{repo} has no revision {revision!r}"
        remedy = f"Its branches, tags and commits are on {page}/tree/main."
    except errors.LocalEntryNotFoundError as error:  # no connection, and not or not all in the cache
        problem = f"no such file or folder, and the hub cannot be asked for {repo}: {_first_line(error)}"
        remedy = "Check the path, or go online once; what is fetched stays in the cache."
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        problem = f"the hub did not give it: {_first_line(error)}"
        remedy = "Run the command again: what has come is kept."
    raise UserError("model", str(path), problem, remedy)


def _first_line(error: Exception) -> str:
    """What an error says, in short."""
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
