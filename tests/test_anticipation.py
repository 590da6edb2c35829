"""Anticipatory routing after a loss spike: which weights choose the experts, on one rank and two; refused settings."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from finback.checkpoint import store
from finback.config import UserError
from finback.model.routing import trace_routers
from finback.model.transformer import Transformer
from finback.parallel.layout import Layout
from finback.parallel.mesh import World
from finback.runs.folder import StageRun
from finback.stages.pretrain import Pretrain
from finback.stages.pretrain_setup import set_up
from finback.stages.pretraining import Pretraining
from finback.train import loop
from finback.train.batch import Batch
from finback.train.loop import Loop
from finback.train.rates import Phase
from tests.many import on_ranks
from tests.test_pretrain import begin, broken_at, prepared, pretrain, trained
from tests.toy import CONFIG, DENSE, V4

__all__ = ["prepared"]

KNOBS: dict[str, Any] = {"anticipatory_steps": 4, "anticipatory_delay": 2}
V4_SHORT = dataclasses.replace(V4, vocab_size=CONFIG.vocab_size, index_topk=4)


@pytest.mark.parametrize("model", [CONFIG, V4_SHORT], ids=["v3", "v4"])
def test_choices_after_a_spike_are_those_of_weights_two_updates_old(
    model: Any, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps without a finite loss lead back to step 5; older weights route steps 6 to 9, and step 10 its own."""
    broken_at(monkeypatch, 7, 8, 9)
    training = begin(
        prepared, pretrain(name=f"spiked-{model.attention}", model=model, document_mask=True, adam_lr=0.05, **KNOBS)
    )
    assert training.anticipation is not None
    weights: dict[int, dict[str, Tensor]] = {}
    given: dict[int, Tensor | None] = {}
    batches: dict[int, Batch] = {}
    step, backward, routing = training.step, training.trainer.backward, training.anticipation.routing

    def watched(at: Loop) -> dict[str, Any]:
        weights[at.step] = {n: t.clone() for n, t in training.trainer.model.state_dict().items()}
        training.now = at.step  # type: ignore[attr-defined]
        return step(at)

    def watched_backward(batch: Batch, terms: Any) -> Tensor:
        now = training.now  # type: ignore[attr-defined]
        given[now] = None if routing.given is None else routing.given.flatten(0, 1)
        batches[now] = batch
        return backward(batch, terms)

    training.step, training.trainer.backward = watched, watched_backward  # type: ignore[method-assign, assignment]
    results = loop.run(training)
    assert results["rewinds"] == 1 and [at for at, ids in given.items() if ids is not None] == [6, 7, 8, 9]
    differs = False
    for at, source in ((6, 6), (7, 6), (8, 6), (9, 7)):
        older, present = (_chosen(model, weights[i], batches[at]) for i in (source, at))
        assert torch.equal(given[at], older)
        differs |= not torch.equal(older, present)
    assert differs, "the weights change between steps, and so do their choices"


def _chosen(config: Any, weights: dict[str, Tensor], batch: Batch) -> Tensor:
    """The experts (tokens, layers, k) that a model with these weights chooses; -1 in layers without experts."""
    model = Transformer(config)
    model.load_state_dict(weights)
    tokens, padding_mask, document_ids = batch.inputs
    found = torch.full((tokens.numel(), config.num_hidden_layers, config.num_experts_per_tok), -1, dtype=torch.int16)
    with torch.no_grad(), trace_routers(model.eval()).recording(found, torch.arange(len(found))):
        model(tokens, padding_mask=padding_mask, document_ids=document_ids)
    return found


def test_without_a_spike_nothing_is_otherwise(prepared: Path) -> None:
    folders = [trained(prepared, name, **knobs)[2] for name, knobs in (("off", {}), ("on", KNOBS))]
    one, other = (store.load(folder / "model.safetensors")[0] for folder in folders)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_two_ranks_route_as_one_does(prepared: Path) -> None:
    """A rank records its own rows' choices and a checkpoint has all: each number of ranks resumes from the other's."""
    losses = _losses(prepared, "one", range(1, 7))
    torch.save(losses, prepared / "one.pt")
    on_ranks(2, _on_two, str(prepared))
    again = _losses(prepared, "two", range(4, 7))
    assert all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(again, losses[3:], strict=True))


def _on_two(root: str) -> None:
    losses = _losses(Path(root), "two", range(1, 7))
    expected = torch.load(Path(root) / "one.pt")
    assert all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(losses, expected, strict=True))


def _losses(root: Path, name: str, steps: range) -> list[float]:
    """Losses of these steps; older weights route all but the first. A checkpoint is written after step 3."""
    stage = pretrain(name=name, phases=(Phase(2000),), **KNOBS | {"anticipatory_steps": 9})
    training = _begun(root, stage)
    at, found = Loop(training), []
    state = at.restore()
    assert (state is None) == (steps.start == 1) and training.anticipation is not None
    if state is not None:
        training.load_state(state)
        assert len(training.anticipation.choices) == 2
    for number in steps:
        if number == 2:
            training.anticipation.start()
        found.append(at.advance()["loss"])
        if number == 3 and steps.start == 1:
            at.checkpoint()
            training.trainer.settle()
    return found


def _begun(root: Path, stage: Pretrain) -> Pretraining:
    world = World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()
    run = StageRun(root, stage.name, 0, world, quiet=True)
    run.folder.mkdir(exist_ok=True)
    return set_up(stage, run)


def test_what_has_no_such_routing_is_named(prepared: Path) -> None:
    for make, words in (
        (lambda: pretrain(layout=Layout(dp=2), **KNOBS), r"base\.anticipatory_steps"),
        (lambda: pretrain(compile=True, **KNOBS), r"base\.anticipatory_steps"),
        (lambda: pretrain(anticipatory_delay=0), r"base\.anticipatory_delay"),
        (lambda: trained(prepared, "dense", model=DENSE, **KNOBS), r"dense\.anticipatory_steps.*no routed experts"),
    ):
        with pytest.raises(UserError, match=words):
            make()
