"""Writes a sharded model to files from all ranks: each stored tensor is assembled on one rank that holds a part of it.

A rank needs memory for its share and one stored tensor: usually a matrix of one expert at most, but all experts of a layer for
families that store them as one tensor, such as gpt-oss. All ranks must see the same file system, and each writes its own
files. If one rank cannot write, all raise an error and the unfinished folder is removed.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from finback.checkpoint import export, names
from finback.checkpoint.audit import shapes
from finback.checkpoint.distributed import on_first
from finback.checkpoint.export import SHARD_BYTES, Format
from finback.checkpoint.shards import BESIDE, INDEX, SINGLE
from finback.checkpoint.shares import Share
from finback.checkpoint.stored_names import fuse, fused, fused_shapes
from finback.checkpoint.tensor_file import Contents, TensorFile
from finback.model.config import ModelConfig, to_json
from finback.runs.files import write_json

Held = dict[str, list[tuple[int, int]]]  # for each parameter, the runs (start, stop) of its numbers that a rank holds


class Piece(NamedTuple):
    """Numbers start..stop of a parameter, and the rank that holds them."""

    rank: int
    start: int
    stop: int


class Entry(NamedTuple):
    """A tensor of the name table: numbers of the parameter `ours` from `start` on, the rank that writes it, and their location."""

    name: str
    shape: tuple[int, ...]
    # the stored tensor that it is or belongs to
    stored: str
    ours: str
    start: int
    owner: int
    pieces: list[Piece]


def export_shares(
    config: ModelConfig,
    shares: Sequence[Share],
    folder: Path,
    fmt: Format = "bf16",
    extras: Callable[[Path], None] | None = None,
    settings: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the Hugging Face folder that checkpoint.export.export would write from one rank. Collective.

    shares: this rank's parts of parameters and router biases; together the ranks hold all. `extras` and `settings` are used
    on rank 0 only.
    """
    group = dist.new_group(backend="gloo")
    folder = on_first(lambda: export.check_target(folder), group)
    unfinished = on_first(lambda: export.begin(folder, config, fmt), group)
    with _gone_on_error(unfinished):
        weight_map, _ = _write(config, shares, unfinished, fmt, shard_bytes, group)

        def complete() -> None:
            if SINGLE not in weight_map.values():
                export.write_index(unfinished, weight_map)
            export.complete(unfinished, folder, export.config_json(config, fmt, settings), extras)

        on_first(complete, group)


def save_shares(
    config: ModelConfig, shares: Sequence[Share], folder: Path, extras: Callable[[Path], None] | None = None
) -> None:
    """Writes a model in a stage's own form, fp32 under Hugging Face's names, for models.load and models.stored. Collective.

    The folder may contain other files. The index is written last; without it the folder holds no model.
    """
    group = dist.new_group(backend="gloo")
    unfinished = folder / ".model"

    def begin() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def complete(weight_map: dict[str, str], digests: dict[str, str]) -> None:
        export.write_index(unfinished, weight_map, sha256=digests)
        if extras:
            extras(folder)
        write_json(folder / "model.json", to_json(config))
        # removes an earlier model, its index first
        for file in [folder / INDEX, folder / SINGLE, *folder.glob("model-*.safetensors")]:
            file.unlink(missing_ok=True)
        for file in sorted(unfinished.iterdir(), key=lambda path: path.name == INDEX):
            file.replace(folder / file.name)
        unfinished.rmdir()

    on_first(begin, group)
    with _gone_on_error(unfinished):
        weight_map, digests = _write(config, shares, unfinished, None, SHARD_BYTES, group)
        on_first(lambda: complete(weight_map, digests), group)


@contextmanager
def _gone_on_error(unfinished: Path) -> Iterator[None]:
    """Removes the folder if the context raises."""
    try:
        yield
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write(
    config: ModelConfig,
    shares: Sequence[Share],
    folder: Path,
    fmt: Format | None,
    shard_bytes: int,
    group: dist.ProcessGroup,
) -> tuple[dict[str, str], dict[str, str]]:
    """Writes all files (fmt None: a stage's own form); returns each tensor's file and each file's digest.

    OSError, on all ranks, if any of them cannot write.
    """
    mine: dict[str, list[tuple[int, Tensor]]] = {}
    for share in shares:
        mine.setdefault(share.name, []).extend(share.runs())
    held: list[Held] = [{} for _ in range(dist.get_world_size())]
    spans = {name: [(start, start + len(view)) for start, view in found] for name, found in mine.items()}
    dist.all_gather_object(held, spans, group=group)
    entries = plan(config, held, fmt)
    sizes = {e.name: e.shape for e in entries}
    sizes = sizes if fmt is None else fused_shapes(sizes, config)
    owners = {e.stored: e.owner for e in entries}
    files = arrange(config, {name: (owners[name], shape) for name, shape in sizes.items()}, fmt, shard_bytes)
    writer = _Writer(folder, sizes, files, fmt or "fp32")
    gathered = ((e.name, _gather(e, mine.get(e.ours, []), writer.fmt, group)) for e in entries)
    here = ((name, tensor) for name, tensor in gathered if tensor is not None)
    for name, tensor in here if fmt is None else fuse(here, config):
        writer.write(name, tensor)
    agree(writer.trouble, group)
    digests: list[dict[str, str]] = [{} for _ in held]
    dist.all_gather_object(digests, writer.digests, group=group)
    beside = () if fmt is None else export.lies_beside(config)
    indexed = [name for name in sizes if not name.startswith(beside)]  # an empty tuple is no prefix of any name
    weight_map = {kept: files[name] for name in indexed for kept in export.stored_as(name, sizes[name], writer.fmt)}
    return weight_map, {file: digest for some in digests for file, digest in some.items()}


def plan(config: ModelConfig, held: list[Held], fmt: Format | None) -> list[Entry]:
    """Every tensor in the order of the name table, the same on all ranks; bytes are balanced over owners.

    Tensors that are stored as one have one owner.
    """
    sizes = shapes(config, biases=fmt is None)
    table = names.table(config, biases=fmt is None)
    whole = {} if fmt is None else {part: name for name, parts in fused(config).items() for part in parts}
    owners: dict[str, int] = {}
    load: Counter[int] = Counter()
    found: dict[str, Entry] = {}
    for ours, theirs in table.items():
        everyone = sorted((*span, rank) for rank, spans in enumerate(held) for span in spans.get(ours, ()))
        for index, name in enumerate(theirs):
            shape = sizes[name]
            count = torch.Size(shape).numel()
            start = index * count
            stored = whole.get(name, name)
            owner, pieces = _owned(everyone, start, start + count, load, ours, owners.get(stored))
            owners[stored] = owner
            load[owner] += export.size(name, shape, fmt or "fp32")
            found[name] = Entry(name, shape, stored, ours, start, owner, pieces)
    for copy, original in export.copies(config).items() if fmt is not None else ():
        found[copy] = found[original]._replace(name=copy, stored=copy)
        load[found[copy].owner] += export.size(copy, found[copy].shape, fmt or "fp32")
    return list(found.values())


def _owned(
    everyone: list[tuple[int, int, int]], start: int, stop: int, load: Counter[int], ours: str, owner: int | None
) -> tuple[int, list[Piece]]:
    """The rank that writes numbers start..stop of a parameter, by default one that holds some of them, and the pieces."""
    there = [(max(a, start), min(b, stop), rank) for a, b, rank in everyone if a < stop and b > start]
    assert there, f"no rank holds {ours}"
    if owner is None:
        owner = min({rank for _, _, rank in there}, key=lambda rank: (load[rank], rank))
    pieces, at = [], start
    while at < stop:
        covering = [(rank != owner, rank, b) for a, b, rank in there if a <= at < b]
        assert covering, f"no rank holds number {at} of {ours}"
        _, rank, end = min(covering)
        pieces.append(Piece(rank, at, end))
        at = end
    return owner, pieces


def arrange(
    config: ModelConfig, stored: dict[str, tuple[int, tuple[int, ...]]], fmt: Format | None, shard_bytes: int
) -> dict[str, str]:
    """The file of each stored tensor: each owner has its own files of about shard_bytes; MTP layers go to separate files."""
    apart = export.lies_beside(config) if fmt is not None else ()
    groups: dict[tuple[bool, int, int], list[str]] = {}  # (in a file of MTP layers, owner, number)
    filled: Counter[tuple[bool, int]] = Counter()
    number: Counter[tuple[bool, int]] = Counter()
    for name, (owner, shape) in stored.items():
        whose = name.startswith(apart), owner
        size = export.size(name, shape, fmt or "fp32")
        if filled[whose] and filled[whose] + size > shard_bytes:
            number[whose] += 1
            filled[whose] = 0
        filled[whose] += size
        groups.setdefault((*whose, number[whose]), []).append(name)
    found: dict[str, str] = {}
    for is_beside, stem, single in ((False, "model", None if fmt is None else SINGLE), (True, "model-mtp", BESIDE)):
        some = [groups[key] for key in sorted(groups) if key[0] == is_beside]
        for i, group in enumerate(some, start=1):
            alone = single if len(some) == 1 else None
            found |= dict.fromkeys(group, alone or f"{stem}-{i:05}-of-{len(some):05}.safetensors")
    return found


def _gather(entry: Entry, mine: list[tuple[int, Tensor]], fmt: Format, group: dist.ProcessGroup) -> Tensor | None:
    """The whole tensor on its owner, in bf16 if it is stored in bf16, otherwise in fp32; None on other ranks."""
    rank = dist.get_rank()
    dtype = torch.float32 if fmt != "bf16" or entry.name.endswith("e_score_correction_bias") else torch.bfloat16
    if rank != entry.owner:
        for piece in entry.pieces:
            if piece.rank == rank:
                dist.send(_own(mine, piece).to("cpu", dtype).contiguous(), entry.owner, group=group)
        return None
    whole = torch.empty(entry.shape, dtype=dtype)
    flat, waiting = whole.view(-1), []
    for piece in entry.pieces:
        into = flat[piece.start - entry.start : piece.stop - entry.start]
        if piece.rank == rank:
            into.copy_(_own(mine, piece))
        else:
            waiting.append(dist.irecv(into, piece.rank, group=group))
    for work in waiting:
        assert work is not None, "this rank is a member of the group"
        work.wait()
    return whole


def _own(mine: list[tuple[int, Tensor]], piece: Piece) -> Tensor:
    start, view = next((s, v) for s, v in mine if s <= piece.start and piece.stop <= s + len(v))
    return view[piece.start - start : piece.stop - start]


class _Writer:
    """Writes this rank's files. After an error it writes nothing more, but the rank still joins the collectives."""

    def __init__(self, folder: Path, sizes: dict[str, tuple[int, ...]], files: dict[str, str], fmt: Format) -> None:
        self.folder, self.fmt, self.files = folder, fmt, files
        self.contents: dict[str, Contents] = {}
        for name, file in files.items():
            self.contents.setdefault(file, {}).update(export.stored_as(name, sizes[name], fmt))
        self.open: dict[str, TensorFile] = {}
        self.digests: dict[str, str] = {}
        self.trouble: OSError | None = None

    def write(self, name: str, tensor: Tensor) -> None:
        if self.trouble is not None:
            return
        file = self.files[name]
        try:
            if file not in self.open:
                self.open[file] = TensorFile(self.folder / file, self.contents[file])
            for stored, values in export.cast(name, tensor, self.fmt):
                self.open[file].write(stored, values)
            if not self.open[file].left:
                self.digests[file] = self.open.pop(file).close()
        except OSError as error:
            where = f"{error.filename or self.folder / file} (rank {dist.get_rank()})"
            self.trouble = OSError(error.errno, error.strerror, where)


def agree(trouble: Exception | None, group: dist.ProcessGroup) -> None:
    """Raises on all ranks the error of the first rank that has one. Collective."""
    everyone: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, trouble, group=group)
    for error in everyone:
        if error is not None:
            raise error
