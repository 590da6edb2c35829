"""Models from the hub by name, with a local hub that also refuses requests, breaks off and disappears."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from huggingface_hub import constants

from finback.checkpoint.export import export
from finback.checkpoint.models import find_model, load
from finback.config import UserError
from finback.data import tokenizer
from finback.data.tokenizer import Tokenizer
from finback.model.transformer import Transformer
from finback.planner.planned_stage import stored_model
from finback.report.export import export_model
from finback.report.gguf_file import export_gguf
from finback.runs import adapters, hub_models
from finback.runs.files import read_json, write_json
from finback.runs.folder import StageRun
from finback.runs.recipe import Recipe, claim
from finback.serve.options import ServeOptions
from finback.stages.evaluate import Evaluate, Exam
from finback.tasks.math import Chains
from tests.hub_server import Hub, hub_server, use
from tests.toy import DENSE, ROOT, WORDS, finback_process, toy_model

COMMIT = "0" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a model and files that running it does not need."""
    made = tmp_path_factory.mktemp("repository") / "whale"
    export(toy_model(), made, "fp32")
    tokenizer.train([WORDS], 320, made / "tokenizer.json")
    for name in ("pytorch_model.bin", "modeling_whale.py", "onnx/model.onnx", "onnx/config.json", "whale.gguf"):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_bytes(b"x" * 64)
    (made / "additional_chat_templates").mkdir()
    (made / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    return made


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as found:
        use(found, tmp_path / "cache", monkeypatch)
        monkeypatch.chdir(tmp_path)
        yield found


def test_a_model_is_fetched_once_and_nothing_but_it(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add("finback-tests/whale", folder)
    hub.cut.add("model.safetensors")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 10)  # only complete chunks are kept
    name = Path("finback-tests/whale")
    found = find_model(name)
    assert hub_models.commit(found) == commit and hub_models.model_name(found) == hub_models.model_name(name) == "whale"
    wanted = {"config.json", "tokenizer.json", "model.safetensors", "model-mtp.safetensors"}
    assert set(hub.files()) == wanted | {"additional_chat_templates/rag.jinja"}
    ranges = [asked for verb, path, asked in hub.asked if verb == "GET" and path.endswith("/model.safetensors")]
    first, second = ranges
    half = (folder / "model.safetensors").stat().st_size // 2
    assert first == "" and half - 1024 < int(second.removeprefix("bytes=").rstrip("-")) <= half  # where it broke off
    assert torch.equal(load(found).embed, toy_model().embed) and Tokenizer(found).vocab_size == 320
    assert ServeOptions(model=found).name == ServeOptions(model=name).name == "whale"
    blob = (found / "model.safetensors").resolve()
    assert hub_models.model_name(blob) == "whale"

    hub.asked.clear()  # a downloaded commit needs no hub, and a branch only one request for its commit
    assert find_model(Path(f"finback-tests/whale@{commit}")) == found and not hub.asked
    assert find_model(name) == found and not hub.files() and hub.asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model(name) == find_model(Path("hub:finback-tests/whale")) == found
    with pytest.raises(
        UserError, match=r"'finback-tests/shark': no such file or folder, and the hub cannot be reached"
    ):
        find_model(Path("finback-tests/shark"))


def test_what_is_here_is_taken_first(hub: Hub, folder: Path) -> None:
    shutil.copytree(folder, "finback-tests/whale")
    assert find_model(Path("finback-tests/whale")) == Path("finback-tests/whale")
    with pytest.raises(UserError, match=r"no such file or folder\. Name a run"):  # a typo causes no request
        find_model(Path("finback-tests/whole"))
    for text in ("/no/where", "no/where.gguf", "nowhere", "no/where/at/all", "a+b", "no/../where"):
        assert not hub_models.is_name(Path(text)), text
    assert not hub.asked


def test_what_the_hub_refuses_is_explained(hub: Hub, folder: Path) -> None:
    hub.add("finback-tests/whale", folder)
    hub.add("finback-tests/secret", folder)
    hub.gated.add("finback-tests/secret")
    for name, message in {
        "finback-tests/secret": r"is gated: .* Accept them on https://huggingface.co/finback-tests/secret, and log in",
        "finback-tests/shark": r"no such file or folder, and the hub has no model finback-tests/shark for you",
        "finback-tests/whale@v9": r"has no revision 'v9'. Its branches",
        f"finback-tests/whale@{COMMIT}": rf"has no revision '{COMMIT}'",
        "finback-tests/whale/no.gguf": r"has no file no.gguf",
    }.items():
        with pytest.raises(UserError, match=message):
            find_model(Path(name))
    assert not hub.files() or set(hub.files()) <= {"model.safetensors", "config.json"}
    assert not any(path.endswith((".safetensors", ".json")) for path in map(str, Path("cache").rglob("blobs/*")))


def test_a_gguf_file_of_a_repository_and_a_blob(hub: Hub, folder: Path, tmp_path: Path) -> None:
    export(Transformer(DENSE).initialise(0), tmp_path / "dense", "fp32")
    shutil.copyfile(folder / "tokenizer.json", tmp_path / "dense/tokenizer.json")
    (tmp_path / "files").mkdir()
    export_gguf(tmp_path / "dense", tmp_path / "files/Krill.Q8_0.gguf", "q8_0")
    (tmp_path / "files/other.gguf").write_bytes(b"x")
    hub.add("finback-tests/krill-GGUF", tmp_path / "files", "v1")
    found = find_model(Path("finback-tests/krill-GGUF@v1/Krill.Q8_0.gguf"))
    assert hub.files() == ["Krill.Q8_0.gguf"] and hub_models.model_name(found) == "Krill.Q8_0.gguf"
    blob = found.resolve()
    assert not blob.suffix and hub_models.model_name(blob) == "krill-GGUF"
    assert torch.equal(load(find_model(blob)).embed, load(found).embed) and Tokenizer(blob).vocab_size == 320
    export_model(found, tmp_path / "out", "bf16")
    assert "Krill.Q8_0.gguf" in (tmp_path / "out/README.md").read_text()


def test_an_adapter_does_not_bring_its_base(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    write_json(tmp_path / "lora" / adapters.CONFIG_FILE, {adapters.BASE: "finback-tests/whale"})
    (tmp_path / "lora" / adapters.WEIGHTS_FILE).write_bytes(b"x")
    hub.add("finback-tests/whale", folder)
    hub.add("finback-tests/lora", tmp_path / "lora")
    with pytest.raises(UserError, match=r"fetch it from the hub: finback-tests/whale\+"):
        find_model(Path("finback-tests/lora"))
    assert set(hub.files()) == {adapters.CONFIG_FILE, adapters.WEIGHTS_FILE}
    base, adapter = adapters.places(Path("finback-tests/whale+finback-tests/lora"))
    assert (base / "config.json").is_file() and adapter is not None and adapters.is_adapter(adapter)
    assert hub_models.model_name(base) == "whale"


def test_a_run_stays_with_the_commit_that_it_began_with(hub: Hub, folder: Path, tmp_path: Path) -> None:
    first = hub.add("finback-tests/whale", folder)
    recipe = Recipe(
        "r", (Evaluate(name="before", start="finback-tests/whale", exams=(Exam(name="sums", task=Chains(2, 3)),)),)
    )
    root = tmp_path / "runs"
    root.mkdir()
    claim(recipe, root, 0)
    assert read_json(root / "recipe.json")["hub"] == {"finback-tests/whale": first}
    newer = tmp_path / "newer"
    shutil.copytree(folder, newer)
    second = hub.add("finback-tests/whale", newer)
    assert second != first
    claim(recipe, root, 0)
    ranks = mock.Mock(rank=0)
    assert hub_models.commit(StageRun(root, "before", 0, ranks).input("finback-tests/whale")) == first
    assert hub_models.commit(find_model(Path("finback-tests/whale"))) == second


def test_a_plan_reads_the_config_alone(hub: Hub, folder: Path) -> None:
    hub.add("finback-tests/whale", folder)
    found = stored_model(Path("finback-tests/whale"))
    assert found is not None and found.vocab_size == 320 and hub.files() == ["config.json"]


@pytest.mark.slow
def test_the_recipe_for_a_real_checkpoint_runs_from_the_hub(tmp_path: Path) -> None:
    export(Transformer(DENSE).initialise(0), tmp_path / "smol", "fp32")
    tokenizer.train([WORDS], 320, tmp_path / "smol/tokenizer.json")
    with hub_server() as hub:
        commit = hub.add("finback-tests/smol", tmp_path / "smol")
        settings = ("cold.start=finback-tests/smol", "rl.steps=1", "rl.warmup=1", "rl.patience=0")
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        arguments = [ROOT / "recipes/smol.py", "--runs", tmp_path / "runs"]
        with mock.patch.dict(os.environ, environment):
            done = finback_process("run", *arguments, *(word for each in settings for word in ("--set", each)))
    assert done.returncode == 0, done.stderr[-2000:]
    recipe = read_json(tmp_path / "runs/smol/recipe.json")
    assert recipe["hub"] == {"finback-tests/smol": commit} and "model.safetensors" in hub.files()
    assert (tmp_path / "runs/smol/after/manifest.json").is_file()
