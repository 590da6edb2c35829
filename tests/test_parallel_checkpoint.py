"""Checkpoints of many ranks: resumed on another mesh, written during training, damaged, or of another model."""

import dataclasses
import errno
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from finback.checkpoint.distributed import MANIFEST, Steps, whole_model
from finback.config import UserError
from finback.model.transformer import Transformer
from finback.parallel.layout import Layout
from tests.many import MANY, Way, check, continued, on_many, on_one, on_ranks, pipeline

AVERAGED = Way(ema_decay=0.5, looks=(18,))


def _read(layout: Layout, folder: str, out: str) -> None:
    many, steps = on_many(layout, dataclasses.replace(AVERAGED, seed=99)), Steps(Path(folder))
    assert many.load(steps) == (4, {"loader": [7]})
    numbers = continued(many, AVERAGED, 4, 20)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(numbers))


def _write(layout: Layout, folder: str) -> None:
    """Writes two checkpoints, the second during training, and the remains of a third that was killed."""
    many, steps = on_many(layout, AVERAGED), Steps(Path(folder))
    assert many.load(steps) is None
    continued(many, AVERAGED, 0, 3)
    steps.save(3, many.state(), {"loader": [5]})
    continued_from_3 = continued(many, AVERAGED, 3, 4)
    steps.begin(4, many.state(), {"loader": [7]})
    assert continued(many, AVERAGED, 4, 5) != continued_from_3
    steps.finish()
    steps.finish()
    numbers = continued(many, AVERAGED, 5, 6)
    assert many.load(steps) == (4, {"loader": [7]}), "the state must be restored in place"
    assert continued(many, AVERAGED, 4, 6)[1:] == numbers
    if dist.get_rank() == 0:
        (Path(folder) / "step-00000009.part").mkdir()


def resumes(tmp_path: Path, before: Layout, *after: Layout) -> None:
    folder = tmp_path / "steps"
    on_ranks(before.ranks, _write, before, str(folder))
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000003", "step-00000004", "step-00000009.part"]
    files = {p.suffix for p in folder.rglob("*") if p.is_file()}
    assert files == {".safetensors", ".json"}, "nothing is pickled"
    numbers, _ = on_one(AVERAGED)
    for layout in after:
        on_ranks(layout.ranks, _read, layout, str(folder), str(tmp_path / "out.json"))
        check(json.loads((tmp_path / "out.json").read_text()), numbers[4:])


@pytest.mark.slow
def test_a_checkpoint_continues_on_another_mesh(tmp_path: Path) -> None:
    resumes(tmp_path, Layout(dp=2, ep=2, sharding="zero1"), pipeline("zbv", sharding="zero1"))
    model = Transformer(MANY)
    model.load_state_dict(whole_model(tmp_path / "steps" / "step-00000004", MANY))
    _, after_four = on_one(AVERAGED, 4)
    for name, tensor in model.state_dict().items():
        assert (tensor - after_four[name]).abs().max() <= 2e-4, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Layout(dp=4, ep=2), [Layout(), Layout(dp=2, ep=2, sharding="zero1"), pipeline("1f1b"), pipeline("dualpipev")]),
        (Layout(dp=2, sharding="zero1"), [Layout(dp=4, ep=2, sharding="zero1"), pipeline("zbv", dp=2, ep=2)]),
        (pipeline("1f1b", dp=2, sharding="zero1"), [Layout(dp=4), pipeline("interleaved", dp=2)]),
    ],
    ids=["fsdp and ep", "zero1", "pipeline"],
)
def test_checkpoints_continue_on_any_mesh(tmp_path: Path, before: Layout, after: Any) -> None:
    resumes(tmp_path, before, *after)


def on_first(work: Callable[[], Any]) -> None:
    """Runs a function on rank 0 between two barriers."""
    dist.barrier()
    if dist.get_rank() == 0:
        work()
    dist.barrier()


def _damaged(folder: str) -> None:
    said: list[str] = []
    many, steps = on_many(Layout(dp=2)), Steps(Path(folder), say=said.append)
    for step in (1, 2):
        steps.save(step, many.state(), {"step": step})
    victim = sorted((Path(folder) / "step-00000002").glob("*.safetensors"))[1]
    if dist.get_rank() == 0:
        content = bytearray(victim.read_bytes())
        content[-100] ^= 1
        victim.write_bytes(content)
    dist.barrier()
    assert steps.load_newest(many.state()) == (1, {"step": 1}), "after a bit flip the checkpoint before must be used"
    assert said == [
        f"{folder}/step-00000002: its files do not match their digests; falling back to the previous checkpoint"
    ]
    manifest, wrong = Path(folder) / "step-00000002" / MANIFEST, "its manifest.json is missing or damaged"
    whole = manifest.read_text()
    for text in ("", "[]", whole[:-20], whole.replace('"step": 2', '"step": 3'), whole.replace('"digest"', '"digesu"')):
        on_first(lambda text=text: manifest.write_text(text))
        assert steps.load_newest(many.state()) == (1, {"step": 1}) and wrong in said[-1]
    on_first(manifest.unlink)
    assert steps.load_newest(many.state()) == (1, {"step": 1}) and len(said) == 7
    on_first(lambda: manifest.write_text(whole))
    on_first(next((Path(folder) / "step-00000001").glob("*.safetensors")).unlink)
    with pytest.raises(UserError, match="its files do not match their digests"):
        steps.load_newest(many.state())
    smaller = on_many(Layout(dp=2), Way(dataclasses.replace(MANY, vocab_size=300)))
    with pytest.raises(UserError, match=r"model\.embed is \(320, 32\), not \(300, 32\)"):
        steps.load(Path(folder) / "step-00000002", smaller.state())


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    on_ranks(2, _damaged, str(tmp_path / "steps"))


def _full(folder: str) -> None:
    """The system refuses rank 1 files of more than 4 KB, as a quota would."""
    many, steps = on_many(Layout(dp=2)), Steps(Path(folder))
    steps.save(1, many.state(), {"step": 1})
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match=r"rank 1") as caught:
        steps.save(2, many.state(), {"step": 2})
    assert caught.value.errno == errno.EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    assert sorted(p.name for p in Path(folder).iterdir()) == ["step-00000001"]
    assert steps.load_newest(many.state()) == (1, {"step": 1})
    steps.save(2, many.state(), {"step": 2})
    assert steps.load_newest(many.state()) == (2, {"step": 2})


def test_a_rank_whose_disk_is_full_ends_the_checkpoint_on_all(tmp_path: Path) -> None:
    on_ranks(2, _full, str(tmp_path / "steps"))
