"""Files are complete or absent: any damage is detected, and a failure leaves the previous file."""

import dataclasses
import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from finback.checkpoint import models, store
from finback.config import UserError
from finback.model.config import ModelConfig
from finback.model.transformer import Transformer
from finback.runs.files import read_json, write_json

META = {"step": 3, "loader": {"drawn": {"chitchat": 7}}, "best": 0.25, "start": None, "word": "é\n"}
REMEDY = "Delete it: the run continues from the previous checkpoint, or from the start of the stage."
SMALL = ModelConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    attention="gqa",
    num_key_value_heads=1,
    head_dim=4,
)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """One tensor of every kind that a checkpoint may hold."""
    rng = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(3, 4, generator=rng),
        "half": torch.randn(5, generator=rng).bfloat16(),
        "empty": torch.empty(0, 3),
        "step": torch.tensor(12.0),
        "count": torch.arange(4),
        "mask": torch.tensor([True, False]),
        "turned": torch.randn(3, 2, generator=rng).T,
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and bits are equal."""
    return one.keys() == two.keys() and all(
        one[n].dtype == two[n].dtype
        and one[n].shape == two[n].shape
        and one[n].contiguous().reshape(-1).view(torch.uint8).equal(two[n].contiguous().reshape(-1).view(torch.uint8))
        for n in one
    )


def refusal(path: Path, problem: str) -> Any:
    return pytest.raises(UserError, match=f"^checkpoint = '{path}': {problem}.*{re.escape(REMEDY)}$")


def test_what_is_saved_is_read_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    store.save(path, tensors(), META)
    loaded, meta = store.load(path)
    assert same(loaded, tensors()) and meta == META
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    store.save(path, tensors(1), {})
    assert same(store.load(path)[0], tensors(1)) and store.load(path)[1] == {}


def test_equal_content_is_equal_in_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    found = set()
    for _ in range(20):  # safetensors orders metadata by a hash that changes with every call
        store.save(path, tensors(), META)
        found.add(path.read_bytes())
    assert len(found) == 1


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    store.save(tmp_path / "a.safetensors", {"embed": weight, "head": weight, "row": weight[1]}, {})
    loaded, _ = store.load(tmp_path / "a.safetensors")
    assert same(loaded, {"embed": weight, "head": weight, "row": weight[1]})


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_read_back_with_its_config(tied: bool, tmp_path: Path) -> None:
    model = Transformer(dataclasses.replace(SMALL, tie_word_embeddings=tied)).initialise(0)
    models.save(tmp_path, model)
    loaded = models.load(tmp_path)
    assert loaded.config == model.config and same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert (loaded.head.weight is loaded.embed) == tied
    text = f"model = '{tmp_path / 'none'}': no such file or folder. Name a stage that trains one, a Hugging Face folder, or a .gguf file."
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        models.load(tmp_path / "none")


@pytest.mark.parametrize("mask", [0x01, 0x80])
def test_a_change_of_any_byte_is_noticed(mask: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    store.save(path, {"w": torch.arange(6.0), "half": torch.ones(3).bfloat16()}, META)
    whole = path.read_bytes()
    unnoticed = []
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
        try:
            store.load(path)
            unnoticed.append(position)
        except UserError as error:
            assert (error.field, error.value, error.remedy) == ("checkpoint", str(path), REMEDY)
    assert not unnoticed, f"changed but not detected: {bytes(whole[i] for i in unnoticed)!r}"


def test_a_file_that_ends_early_or_late_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    store.save(path, tensors(), META)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with refusal(path, "cannot be read"):
            store.load(path)
    path.write_bytes(whole + b"\0")
    with refusal(path, "cannot be read"):
        store.load(path)
    with refusal(tmp_path / "none", "cannot be read"):
        store.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"digest": "0" * 64}, "its content does not match its digest"),
        ({}, "its content does not match its digest"),
        ({"meta": "{}"}, "its content does not match its digest"),
    ],
)
def test_a_file_of_someone_else_is_refused(damage: dict[str, str], problem: str, tmp_path: Path) -> None:
    store.save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", metadata=damage or None)
    with refusal(tmp_path / "a.safetensors", problem):
        store.load(tmp_path / "a.safetensors")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_last_two_steps_are_kept(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for step in (5, 10, 100, 2000):
        store.save_step(tmp_path, step, tensors(step), {"step": step})
    assert names(tmp_path) == ["model.safetensors", "step-00000100.safetensors", "step-00002000.safetensors"]
    found = store.load_newest(tmp_path)
    assert found is not None and found[0] == 2000 and found[2] == {"step": 2000}
    assert same(found[1], tensors(2000))


def test_what_a_killed_writer_left_is_dropped(tmp_path: Path) -> None:
    (tmp_path / ".tmpQ3hH4x").write_bytes(b"half a checkpoint")  # the name of safetensors' temporary file
    store.save_step(tmp_path, 1, tensors(), META)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]


def test_a_torn_step_falls_back_to_the_one_before(tmp_path: Path) -> None:
    assert store.load_newest(tmp_path) is None and store.load_newest(tmp_path / "none") is None
    for step in (5, 10):
        store.save_step(tmp_path, step, tensors(step), {"step": step})
    newest, older = tmp_path / "step-00000010.safetensors", tmp_path / "step-00000005.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    found = store.load_newest(tmp_path)
    assert found is not None and found[0] == 5 and same(found[1], tensors(5))
    older.write_bytes(b"")
    with refusal(newest, "cannot be read"):  # the error names the newest one
        store.load_newest(tmp_path)


def test_a_step_whose_meta_is_damaged_falls_back_too(tmp_path: Path) -> None:
    for step in (5, 10):
        store.save_step(tmp_path, step, {"w": torch.ones(2)}, {"step": step})
    newest = tmp_path / "step-00000010.safetensors"
    newest.write_bytes(newest.read_bytes().replace(b'{\\"step', b'[\\"step'))
    found = store.load_newest(tmp_path)
    assert found is not None and found[0] == 5


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "safetensors"],
)
def test_a_full_disk_leaves_the_old_file(failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half of it")
        raise failure

    path = tmp_path / "a.safetensors"
    store.save(path, tensors(), META)
    monkeypatch.setattr(store, "save_file", half)
    with pytest.raises(OSError, match="No space left on device") as caught:
        store.save(path, tensors(1), {})
    assert caught.value.errno == errno.ENOSPC  # the command line recognizes it by this number
    assert names(tmp_path) == ["a.safetensors"] and same(store.load(path)[0], tensors())


def test_a_real_failure_to_write_leaves_the_old_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # Windows has none
    path = tmp_path / "a.safetensors"
    store.save(path, tensors(), META)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            store.save(path, {"w": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert names(tmp_path) == ["a.safetensors"] and same(store.load(path)[0], tensors())


def test_json_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_json(path, META)
    assert read_json(path) == META and json.loads(path.read_bytes()) == META and names(tmp_path) == ["summary.json"]

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"step": 4})
    assert read_json(path) == META
    with pytest.raises(TypeError):
        write_json(path, {"step": object()})
    assert read_json(path) == META
    monkeypatch.undo()
    write_json(path, {"step": 4})
    assert read_json(path) == {"step": 4} and names(tmp_path) == ["summary.json"]


def test_damaged_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    for content in (b"", b'{"step": 4', b"\xff\xfe", b"{'step': 4}"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^run folder = '{path}': damaged \(.*\)\. Delete it and run the recipe"):
            read_json(path)
