"""The prepare stage: its passes give the same shards in one process or several, and after a kill at any point."""

import gc
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finback.config import UserError
from finback.data import document_store, pack
from finback.data.clean import CleaningRules, Quality
from finback.data.corpus import Corpus, ExecutorConfig
from finback.data.encoding import TOGETHER, encode_documents
from finback.data.messages import encode_document
from finback.data.near_duplicates import NearDuplicates
from finback.data.sources import Document, Files
from finback.data.tokenizer import FIM, Tokenizer
from finback.data.turn import Message
from finback.runs.folder import Interrupted, StageRun
from finback.stages import prepare
from finback.stages.prepare import Decontaminate, Prepare, TaskText
from finback.tasks import task as tasks
from finback.tasks.math import Chains

WORDS = re.findall(
    r"\w+", "whales sing of krill and the cold deep sea while ships go by at night under pale stars far away"
)


class Alone:
    """A process group of one rank."""

    rank, size = 0, 1

    def barrier(self) -> None: ...

    def any(self, flag: bool) -> bool:
        return flag


def sentences(seed: int, n: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 40))) + f" {seed}." for _ in range(n)]


def corpus(folder: Path) -> None:
    """Writes three files of prose with a repeat and a near repeat, and dialogues."""
    folder.mkdir()
    for seed in range(3):
        (folder / f"{seed}.txt").write_text("\n\n".join(sentences(seed, 60)))
    long = " ".join(sentences(9, 4))
    (folder / "3.txt").write_text(f"{long}\n\n{long.upper()}\n\n{long} Indeed\n\n{' '.join(sentences(10, 4))}")
    said = [
        {"messages": [{"role": "user", "content": s}, {"role": "assistant", "content": "Yes, " + s}]}
        for s in sentences(7, 90)
    ]
    (folder / "said.jsonl").write_text("\n".join(map(json.dumps, said)))


def stage(folder: Path, **options: Any) -> Prepare:
    return Prepare(
        name="prepare",
        text=(Files((f"{folder}/*.txt",), name="prose"), Files((f"{folder}/said.jsonl",), name="said")),
        tasks=(TaskText(name="sums", tasks=(Chains(2, 3),), documents=70, follow_up=0.3),),
        vocab_size=300,
        interleave=0.5,
        **options,
    )


def run(given: Prepare, root: Path, seed: int = 3) -> StageRun:
    root.mkdir(exist_ok=True)
    stage_run = StageRun(root, given.name, seed, Alone(), quiet=True)
    stage_run.folder.mkdir(exist_ok=True)
    given.run(stage_run)
    return stage_run


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder with its digest."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


ALL = {
    "quality": Quality(min_words=4),
    "near": NearDuplicates(0.7),
    "fim": 0.5,
    "shard_tokens": 2000,
    "decontaminate": Decontaminate((Chains(2, 3),), problems=50),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus, and the folder of a run that made shards of it with every knob set."""
    folder = tmp_path_factory.mktemp("prepare")
    corpus(folder / "text")
    return folder / "text", run(stage(folder / "text", **ALL), folder / "runs").folder


def decoded(folder: Path, name: str) -> list[str]:
    shard, words = pack.read(folder / name), Tokenizer(folder / "tokenizer.json")
    assert shard.ends is not None
    bounds = [0, *shard.ends.tolist()]
    return [words.decode(shard[a:b].tolist(), skip_special=False) for a, b in pairwise(bounds)]


def test_the_record_says_what_was_read_and_what_became_of_it(made: tuple[Path, Path]) -> None:
    text, folder = made
    record = json.loads((folder / "sources.json").read_text())
    prose = record["prose"]
    files = sorted(text.glob("*.txt"))
    assert prose["files"] == [str(path) for path in files] and prose["licence"] == "unstated"
    assert prose["bytes"] == sum(path.stat().st_size for path in files)
    assert prose["sha256"] == hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    counts = prose["documents"]
    assert (counts["read"], counts["duplicate"], counts["near_duplicate"]) == (184, 1, 1)
    dropped = sum(n for reason, n in counts.items() if reason not in ("read", "kept", "redacted"))
    assert counts["read"] == counts["kept"] + dropped and record["sums"]["documents"] == {"kept": 70}
    for name, about in record.items():
        sides = [pack.read(folder / f"{name}.{side}.bin") for side in ("train", "valid")]
        assert [len(side) for side in sides] == [about["train_tokens"], about["valid_tokens"]]
        assert sum(len(side.ends) for side in sides if side.ends is not None) == about["documents"]["kept"]
    removed = [json.loads(line) for line in (folder / "prose.removed.jsonl").read_text().splitlines()]
    assert removed == [{"id": "prose:182", "reason": "near_duplicate", "like": "prose:180"}]
    assert not (folder / "work").exists() and len(list(folder.glob("prose.train*.bin"))) > 1


@pytest.mark.slow
def test_several_processes_make_the_same_files(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four files of prose are read in four pieces, and with 50 documents a segment they are encoded in four."""
    pytest.importorskip("datatrove")
    text, folder = made
    monkeypatch.setattr(prepare, "ExecutorConfig", partial(ExecutorConfig, segment_documents=50))
    other = run(stage(text, **ALL, workers=2), tmp_path / "runs").folder
    assert contents(other) == contents(folder)


def test_segments_of_any_size_make_the_same_files(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "ExecutorConfig", partial(ExecutorConfig, segment_documents=7))
    assert contents(run(stage(made[0], **ALL), tmp_path / "runs").folder) == contents(made[1])


def test_what_a_worker_refuses_is_told_as_by_one_process(tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    corpus(tmp_path / "text")
    (tmp_path / "text" / "1.txt").write_bytes(b"caf\xe9")
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"^prose.paths = '.*1\.txt': not UTF-8 text \(byte 3\)\. Convert it"):
            run(stage(tmp_path / "text", workers=workers), tmp_path / f"runs{workers}")


def test_without_datatrove_workers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus(tmp_path / "text")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError,
        match=r"^workers = 'datatrove': the package is not installed\. Run: .* -m pip install 'datatrove>=0\.10'",
    ):
        run(stage(tmp_path / "text", workers=2), tmp_path / "runs")


KILLED = """
import sys, pickle, os, signal, itertools
from pathlib import Path
from finback.data.document_store import DocumentWriter
from finback.data.pack import ShardWriter
from tests import test_data_prepare as t
text, root, when = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
clock = itertools.count()
def dying(real):
    def call(*args):
        if next(clock) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    return call
DocumentWriter.add, ShardWriter.add = dying(DocumentWriter.add), dying(ShardWriter.add)
t.run(t.stage(text, **t.ALL), root)
"""


@pytest.mark.parametrize(
    "when", [200, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 100, 300, 330, 400, 520, 660))]
)
def test_killed_anywhere_it_goes_on_with_the_source_at_hand(when: int, made: tuple[Path, Path], tmp_path: Path) -> None:
    """About 330 documents are stored and as many are written: each kill is in another source or pass."""
    text, folder = made
    command = [sys.executable, "-c", KILLED, str(text), str(tmp_path / "runs"), str(when)]
    root = Path(__file__).parent.parent
    killed = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    work = tmp_path / "runs" / "prepare" / "work"
    finished = {p: p.stat().st_mtime_ns for p in work.glob("*.read.json")}
    record = json.loads((folder / "sources.json").read_text())
    stored = np.cumsum([about["documents"]["kept"] for about in record.values()])
    assert stored[-1] < 400 and len(finished) == (stored <= when).sum()
    seen: list[str] = []
    touched = {
        p.name: p.stat().st_mtime_ns
        for p in work.glob("*.00000.jsonl")
        if p.name.split(".")[0] in {f.name.split(".")[0] for f in finished}
    }
    real = document_store.DocumentWriter.add

    def noted(self: document_store.DocumentWriter, document: Document) -> None:
        seen.append(self.name)
        real(self, document)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_store.DocumentWriter, "add", noted)
        run(stage(text, **ALL), tmp_path / "runs")
    assert contents(tmp_path / "runs" / "prepare") == contents(folder)
    assert not {name.split(".")[0] for name in touched} & set(seen)  # a finished source is not read again


def test_another_text_is_not_mixed_with_what_was_left(tmp_path: Path) -> None:
    corpus(tmp_path / "text")
    given = stage(tmp_path / "text")
    root = tmp_path / "runs"
    root.mkdir()
    stage_run = StageRun(root, "prepare", 3, Alone(), quiet=True)
    stage_run.folder.mkdir()
    stage_run.stop_requested = True
    with pytest.raises(Interrupted):
        given.run(stage_run)
    (tmp_path / "text" / "0.txt").write_text("\n\n".join(sentences(11, 60)))
    assert contents(run(given, root).folder) == contents(run(given, tmp_path / "fresh").folder)


def test_the_middle_is_asked_for_in_training_text_alone(made: tuple[Path, Path]) -> None:
    text, folder = made
    hole, begin, end = FIM
    plain = set(decoded(folder, "prose.valid.bin"))
    trained = decoded(folder, "prose.train.bin")
    turned = [document for document in trained if begin in document]
    assert 0.3 < len(turned) / len(trained) < 0.7 and not any(begin in document for document in plain)
    whole = {part.strip() for path in text.glob("*.txt") for part in path.read_text().split("\n\n")}
    for document in turned:
        head, prefix = document.removesuffix(trained[0][-len("<｜end▁of▁sentence｜>") :]).split(begin)
        prefix, rest = prefix.split(hole)
        suffix, middle = rest.split(end)
        assert head == "<｜begin▁of▁sentence｜>" and prefix + middle + suffix in whole
    assert not any(token in said for token in FIM for said in decoded(folder, "said.train.bin"))


def test_where_the_middle_lies_depends_on_the_text_alone(made: tuple[Path, Path], tmp_path: Path) -> None:
    words = Tokenizer(made[1] / "tokenizer.json")
    documents = [Document(text=s) for s in sentences(20, 700)]
    ids = {d.text: i.tolist() for d, i in encode_documents(documents, words, 0.3, seed=4)}
    backwards = {d.text: i.tolist() for d, i in encode_documents(documents[::-1], words, 0.3, seed=4)}
    other = {d.text: i.tolist() for d, i in encode_documents(documents, words, 0.3, seed=5)}
    assert ids == backwards != other
    turned = sum(words.ids[FIM[1]] in i for i in ids.values()) / len(ids)
    assert 0.22 < turned < 0.38
    assert all(i == [words.bos, *words.encode(t), words.eos] for t, i in ids.items() if words.ids[FIM[1]] not in i)


def test_many_documents_are_encoded_as_each_alone(made: tuple[Path, Path]) -> None:
    words = Tokenizer(made[1] / "tokenizer.json")
    said = [Document((Message("user", s), Message("assistant", s[:9], s[3:]))) for s in sentences(21, TOGETHER + 9)]
    for document, ids in encode_documents(said, words):
        assert ids.tolist() == encode_document(document.messages, words)
    assert list(encode_documents([], words)) == []


def test_the_questions_that_are_kept_out_are_an_exams(tmp_path: Path) -> None:
    """A run's exam of 50 problems, hidden in prose, in a dialogue and in a list, is found completely."""
    task = Chains(2, 3)
    seed = StageRun(tmp_path, "x", 3, Alone()).seed("exam", task.name)
    exam = [p.question for p in tasks.distinct(task, "held_out", 50, seed)]
    corpus(tmp_path / "text")
    (tmp_path / "text" / "4.txt").write_text("\n\n".join(f"Sums:\n{question}\nand so on" for question in exam[:25]))
    with (tmp_path / "text" / "said.jsonl").open("a") as handle:
        for question in exam[25:]:
            record = {"question": question, "answer": "Who knows what it is?"}
            handle.write("\n" + json.dumps(record))
    given = stage(tmp_path / "text", decontaminate=Decontaminate((task,), problems=50))
    folder = run(given, tmp_path / "runs").folder
    record = json.loads((folder / "sources.json").read_text())
    assert [record[name]["documents"]["contaminated"] for name in ("prose", "said")] == [25, 25]
    removed = [json.loads(line) for line in (folder / "prose.removed.jsonl").read_text().splitlines()]
    assert [r["id"] for r in removed] == [f"prose:{184 + i}" for i in range(25)]
    assert {r["like"] for r in removed} == {task.name}


def test_a_vocabulary_beyond_16_bits_has_wider_words(tmp_path: Path, made: tuple[Path, Path]) -> None:
    """The tokenizer only claims 129,280 entries, since learning more than 65,536 would need far more text."""
    text, folder = made
    words = Tokenizer(folder / "tokenizer.json")
    words.vocab_size = 129_280
    stage_run = StageRun(tmp_path, "prepare", 0, Alone(), quiet=True)
    stage_run.folder.mkdir()
    made_of = Corpus(stage_run, CleaningRules(), None, ExecutorConfig())
    source = Files((f"{text}/0.txt",), name="prose")
    made_of.claim((source,))
    made_of.gather(source, lambda document: document, random.Random(0))
    made_of.write("prose", words, validates=False, fim=0.0, seed=0)
    shard = pack.read(stage_run.folder / "prose.train.bin")
    assert (
        shard.dtype == "<u4"
        and json.loads((stage_run.folder / "prose.train.json").read_text())["vocab_size"] == 129_280
    )
    assert words.decode(shard[:].tolist()) == "".join((text / "0.txt").read_text().split("\n\n"))


@pytest.mark.slow
def test_a_corpus_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5,000 documents no more exist at a time than are encoded together."""
    lines = [json.dumps({"text": f"{i} {text}"}) for i, text in enumerate(sentences(1, 5000))]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    alive: list[int] = []

    def counting(real: Any) -> Any:
        def add(self: Any, given: Any) -> None:
            alive.append(sum(type(o) is Document for o in gc.get_objects()) if len(alive) % 250 == 0 else 0)
            real(self, given)

        return add

    monkeypatch.setattr(document_store.DocumentWriter, "add", counting(document_store.DocumentWriter.add))
    monkeypatch.setattr(pack.ShardWriter, "add", counting(pack.ShardWriter.add))
    source = Files((str(tmp_path / "many.jsonl"),), name="many")
    run(Prepare(name="prepare", text=(source,), vocab_size=300), tmp_path / "runs")
    assert len(alive) == 2 * 5000 and 0 < max(alive) < 2 * TOGETHER


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fim": 1.5}, "prepare.fim = 1.5: a share is between 0 and 1. Correct it."),
        ({"workers": -1}, "prepare.workers = -1: below 0. Use 0 for this process only."),
        ({"shard_tokens": 0}, "prepare.shard_tokens = 0: not above 0. Use 1 or more."),
    ],
)
def test_knobs_out_of_range_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        stage(tmp_path, **options)
    assert str(refused.value) == message
