"""Distillation from one teacher per domain: local models, or servers that return their likeliest tokens."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finback.checkpoint import models
from finback.config import UserError
from finback.data import tokenizer
from finback.data.tokenizer import Tokenizer
from finback.engine.engine import Engine, EngineConfig
from finback.model.count import forward_flops_of
from finback.parallel.layout import Layout
from finback.planner.planned_stage import planned_stages
from finback.report.docs.facts import StageFacts
from finback.rollouts.servers import Servers
from finback.runs.recipe import config_json
from finback.stages.distill import Distill
from finback.stages.teachers import ServerTeacher
from finback.tasks.math import Chains
from finback.tasks.task import Mixture
from finback.train.batch import Batch
from finback.train.loss import distillation, likeliest_distillation
from tests.engine_servers import engine_server
from tests.serving import served
from tests.test_tuning import stage_folder, tune

SHORT, LONG = Chains(2, 2), Chains(3, 4)
# one request at a time, so that none is in flight when a connection closes
QUICK: dict[str, Any] = {"tries": 1, "backoff": 0.01, "concurrency": 1}
ON_POLICY: dict[str, Any] = {
    "traces": (),
    "task": Mixture((SHORT, LONG)),
    "prompts_per_step": 6,
    "max_tokens": 6,
    "mtp_weight": 0.0,
    "balance_alpha": 0.0,
    "divergence": "reverse",
}


def test_likeliest_tokens_by_hand() -> None:
    """A student with 1/2, 1/4, 1/4; the teacher gives only the second token's 1/2, so the others are one outcome."""
    student = torch.tensor([[0.5, 0.25, 0.25]]).log()
    ids, logprobs = torch.tensor([[1]]), torch.tensor([[0.5]]).log()
    forward, reverse = (likeliest_distillation(student, ids, logprobs, form) for form in ("forward", "reverse"))
    assert forward.item() == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert reverse.item() == pytest.approx(0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5))


@torch.no_grad()
def by_hand(t: Any, batch: Batch, folders: dict[str, Path], top_k: int) -> list[float]:
    """The divergence of each row from the model of its domain."""
    student, names, found = t.trainer.model, list(folders), []
    for row in range(len(batch.tokens)):
        teacher = models.load(folders[names[int(batch.teachers[row])]]).eval()
        ids, learnt = batch.tokens[row, batch.padding_mask[row]], batch.learnt[row, batch.padding_mask[row]]
        ours, theirs = (m.logits(m(ids[None])[0, learnt])[:, :320] for m in (student, teacher))
        found.append(float(distillation(ours, theirs, "reverse", top_k).sum()))
    return found


def loss(t: Any, batch: Batch) -> Tensor:
    tokens, padding_mask, document_ids = batch.inputs
    states = t.trainer.model(tokens, padding_mask=padding_mask, document_ids=document_ids)
    found: Tensor = t.teacher.loss(states, batch)
    return found


def test_each_question_is_taught_by_its_domains_teacher(tmp_path: Path) -> None:
    """The student teaches the first domain itself and learns nothing there; another model teaches the second."""
    stage_folder(tmp_path, 1, "base"), stage_folder(tmp_path, 2, "other")
    folders = {SHORT.name: tmp_path / "base", LONG.name: tmp_path / "other"}
    t = tune(tmp_path, Distill, teacher={SHORT.name: "base", LONG.name: "other"}, top_k=5, **ON_POLICY)
    batch, _ = t.batches.batch(1)
    assert batch is not None and batch.teachers is not None and sorted({*batch.teachers.tolist()}) == [0, 1]
    rows = by_hand(t, batch, folders, 5)
    assert all((value > 1e-3) == bool(number) for value, number in zip(rows, batch.teachers, strict=True))
    found, expected = loss(t, batch), torch.tensor(sum(rows))
    torch.testing.assert_close(found.detach(), expected, atol=1e-4, rtol=1e-5)
    assert t.teacher is not None and isinstance(t.stage, Distill)
    assert t.teacher.flops(batch) == sum(forward_flops_of(t.config, batch.taught_by(n).lengths()) for n in (0, 1)) > 0
    for kind in ("vllm", "sglang", "finback"):
        with serving(kind, tmp_path / "other") as url:
            teacher = ServerTeacher(t.stage, t.batches.run, Servers((url,), **QUICK), t.tokenizer)
            t.teacher.teachers[1] = teacher
            torch.testing.assert_close(loss(t, batch).detach(), expected, atol=1e-4, rtol=1e-5)
            assert t.teacher.flops(batch) == forward_flops_of(t.config, batch.taught_by(0).lengths())
            assert loss(t, batch.taught_by(0)).abs() < 1e-4, "no server may be asked without rows"
            teacher.close()


@contextmanager
def serving(kind: str, folder: Path) -> Iterator[str]:
    """The url of a server for the model in a folder, until the block ends."""
    if kind == "finback":
        engine = Engine(models.load(folder).eval(), (), EngineConfig(8, 4096, 64), Tokenizer(folder))
        with served(engine) as client:
            yield f"http://127.0.0.1:{client.base_url.port}/v1"
    else:
        with engine_server(folder, kind) as (url, _):
            yield url


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        (
            {"teacher": {SHORT.name: "other"}},
            r"tuned\.teacher = \['chains-2'\]: no teacher for the domain 'chains-3-4'",
        ),
        (
            {"teacher": {SHORT.name: "other", LONG.name: "other", "chain-2": "base"}},
            r"tuned\.teacher = 'chain-2': no task .* Did you mean 'chains-2'",
        ),
        ({"teacher": {"kept": "other"}, "task": None, "traces": ("kept",)}, "given lessons have no domains"),
        ({"teacher": Servers(("http://127.0.0.1:9",))}, r"tuned\.top_k = 0: servers report only"),
        (
            {"teacher": Servers(("http://127.0.0.1:9",)), "top_k": 5, "layout": Layout(cp=2)},
            r"tuned\.layout\.cp = 2: servers read whole rows",
        ),
        ({"teacher": Servers(("http://127.0.0.1:9",), **QUICK), "top_k": 5}, r"tuned\.teacher = .*no server answers"),
    ],
)
def test_teachers_that_cannot_teach_are_named(knobs: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=text):
        tune(tmp_path, Distill, **ON_POLICY | knobs)


def test_a_server_that_says_too_little_or_reads_otherwise_is_refused(tmp_path: Path) -> None:
    stage_folder(tmp_path, 1, "base"), stage_folder(tmp_path, 2, "foreign")
    with engine_server(tmp_path / "base", "sglang") as (url, server):
        t = tune(tmp_path, Distill, teacher=Servers((url,), **QUICK), top_k=5, **ON_POLICY)
        batch, _ = t.batches.batch(1)
        assert batch is not None
        server.change = lambda reply: reply["meta_info"]["input_top_logprobs"][1].pop()
        with pytest.raises(UserError, match="does not report its 5 likeliest tokens at each position"):
            loss(t, batch)
        t.close()
    tokenizer.train(["zzyy yyzz xxyy zyxw" * 50], 320, tmp_path / "foreign/tokenizer.json")
    with engine_server(tmp_path / "foreign") as (url, _), pytest.raises(UserError, match="different tokenizer"):
        tune(tmp_path, Distill, teacher=Servers((url,), **QUICK), top_k=5, **ON_POLICY)


def test_plan_and_documents_name_all_teachers(tmp_path: Path) -> None:
    stage_folder(tmp_path, 2, "other")
    folder, urls = str(tmp_path / "other"), ("http://a:1", "http://b:1")
    stage = Distill(
        name="small", start=folder, teacher={SHORT.name: folder, LONG.name: Servers(urls)}, top_k=5, **ON_POLICY
    )
    assert stage.inputs() == (folder, folder)
    (planned,) = planned_stages([config_json(stage)])
    assert planned.teachers == (planned.model,)
    assert StageFacts(tmp_path / "small", config_json(stage)).teachers == [folder, "http://a:1, http://b:1"]
