"""What the tests of many ranks share: a model with experts, and processes that communicate over gloo."""

import dataclasses
import json
import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from finback.data.rows import PADDING, Row
from finback.model.config import CSA, HCA, SLIDING, ModelConfig
from finback.model.fp4 import Qat
from finback.model.logprobs import text_logprobs
from finback.model.recompute import Policy
from finback.model.transformer import Transformer
from finback.parallel.layout import Layout
from finback.parallel.mesh import World
from finback.train.batch import Batch, of_rows
from finback.train.loss import LossTerms
from finback.train.optim import Adam, Muon, MuonForm, is_matrix
from finback.train.sharded_options import ShardedOptions
from finback.train.sharded_trainer import ShardedTrainer
from finback.train.trainer import ReplicatedTrainer, Trainer
from tests.toy import CONFIG, V4

MANY = dataclasses.replace(
    CONFIG, num_hidden_layers=4, n_routed_experts=8, n_group=2, topk_group=1, initializer_range=0.15
)
KINDS: Any = (CSA, HCA, SLIDING, CSA)
# a clamp as large as the release's: at a smaller one the loss jumps, and rounding decides on which side a number is
V4_MANY = dataclasses.replace(
    V4, vocab_size=320, num_hidden_layers=4, layer_types=KINDS, num_nextn_predict_layers=1, hc_mult=2
)
V4_MANY = dataclasses.replace(V4_MANY, swiglu_limit=10.0)
SPARSE_MANY = dataclasses.replace(MANY, index_topk=6, index_n_heads=16, index_head_dim=8)

ROWS, SEQ_LEN, STEPS = 8, 16, 20
MTP_WEIGHT, BALANCE_ALPHA, BIAS_SPEED, MAX_GRAD_NORM = 0.3, 0.05, 0.02, 1.0
LR = 3e-3
Numbers = list[list[float]]  # per step: loss, MTP loss, balance loss, gradient norm
IMPORTED = [f"torch.distributed.{n}" for n in ("fsdp", "pipelining", "checkpoint")] + ["tests.many"]


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Runs work(*arguments) in `ranks` processes of one process group; fails if any of them does."""
    started(ranks, _run, ranks, work, arguments)


def started(ranks: int, target: Callable[..., None], *arguments: Any) -> None:
    """Runs target(rank, *arguments) in `ranks` processes, which can meet; fails if any of them does.

    They meet in a store of this process: a port that rank 0 opened later could be taken by then.
    """
    context, store = multiprocessing.get_context("forkserver"), c10d.TCPStore("127.0.0.1", 0, is_master=True)
    context.set_forkserver_preload(IMPORTED)  # once for all tests: the import takes longer than most of them
    children = [context.Process(target=_meet, args=(r, store.port, target, arguments)) for r in range(ranks)]
    for child in children:
        child.start()
    for child in children:
        child.join(600)
    hung = [child for child in children if child.is_alive()]
    for child in hung:
        child.kill()
    assert not hung and all(child.exitcode == 0 for child in children), [c.exitcode for c in children]


def _meet(rank: int, port: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # rank 0 opens no store
    with one_thread():
        target(rank, *arguments)


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes with one thread, like each of many ranks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _run(rank: int, ranks: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    work(*arguments)
    dist.destroy_process_group()


@dataclass(frozen=True)
class Way:
    """A training setup, for one rank or for many."""

    config: ModelConfig = MANY
    optimizer: Literal["muon", "adamw"] = "muon"
    muon_form: MuonForm = "jordan"
    # of the weights: chosen so that rounding decides neither between two experts' scores nor on a gradient's sign
    seed: int = 5
    # rows of each step, repeated in a cycle
    rows: tuple[int, ...] = (ROWS,)
    # several documents in a row, which do not attend to each other, with padding at the end
    packed: bool = False
    ema_decay: float = 0.0
    compute: Literal["fp32", "fp8"] = "fp32"
    qat: Qat = "none"
    recompute: Policy = "none"
    compile: bool = False
    # the rows of a step in reverse order, which only changes the order of sums and the tiles of FP8
    reversed: bool = False
    # after these steps the model is evaluated
    looks: tuple[int, ...] = ()

    @property
    def options(self) -> ShardedOptions:
        names = [f.name for f in dataclasses.fields(ShardedOptions) if hasattr(self, f.name)]
        return ShardedOptions(**{name: getattr(self, name) for name in names})


def batches(way: Way, steps: int) -> Iterator[Batch]:
    """All rows of each step, the same for every caller."""
    random = np.random.default_rng(6)
    width = SEQ_LEN + 1 + way.config.num_nextn_predict_layers
    for step in range(steps):
        rows = []
        for _ in range(way.rows[step % len(way.rows)]):
            size = int(random.choice([width, width - 3, SEQ_LEN - 4])) if way.packed else width
            document_ids = np.where(np.arange(width) < size, random.random(width) < 0.2, False).cumsum()
            document_ids[size:] = PADDING
            rows.append(Row(random.integers(0, 320, width), document_ids if way.packed else None, size))
        yield of_rows(rows[::-1] if way.reversed else rows, SEQ_LEN)


def on_one(way: Way, steps: int = STEPS) -> tuple[Numbers, dict[str, Tensor]]:
    """The plain twin: the whole model on one rank, with one thread like each of many ranks."""
    with one_thread():
        trainer = one_rank(way)
        return continued(trainer, way, 0, steps), trainer.model.state_dict()


def one_rank(way: Way) -> ReplicatedTrainer:
    """A trainer of the whole model, with its gradients and optimizers."""
    model = way.options.put_on(Transformer(way.config, way.options.dtype).initialise(way.seed)).train()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [(n, p) for n, p in named if is_matrix(n, p)]
    first = (
        Muon(matrices, World(), compute=way.options.dtype, form=way.muon_form)
        if way.optimizer == "muon"
        else Adam(matrices, (0.9, 0.95), 0.05)
    )
    adam = Adam([(n, p) for n, p in named if not is_matrix(n, p)], (0.9, 0.95), 0.0)
    return ReplicatedTrainer(model, World(), (first, adam), named, ema_decay=way.ema_decay)


def on_many(layout: Layout, way: Way = Way()) -> ShardedTrainer:
    """This rank's shard of the same trainer."""
    return ShardedTrainer(way.config, layout, max(way.rows), way.seed, way.options)


def continued(trainer: Trainer, way: Way, begin: int, end: int) -> Numbers:
    """Steps begin..end of either trainer, with the evaluations in between."""
    numbers = []
    for number, batch in enumerate(batches(way, end)):
        if number >= begin:
            numbers.append(step(trainer, batch))
            if number in way.looks:
                numbers.append(looked(trainer))
    return numbers


def looked(trainer: Trainer) -> list[float]:
    """Mean log-probabilities of a text: by the sharded model, by its average, and by the whole model on every rank."""
    tokens = torch.arange(3 * 20).view(3, 20)
    found = [trainer.text_logprobs(tokens)]
    with trainer.averaged():
        found.append(trainer.text_logprobs(tokens))
    found.append(text_logprobs(trainer.gathered(), tokens))
    return [*(logp.mean().item() for logp in found), 0.0]


def step(trainer: Trainer, batch: Batch, mtp_weight: float = MTP_WEIGHT) -> list[float]:
    """One training step: losses over all ranks and the gradient norm; no update unless both are finite."""
    counts = batch.counts(trainer.model.config.num_nextn_predict_layers).tolist()
    mine = slice(trainer.data_rank, None, trainer.data_ranks)
    share: dict[str, Any] = {name: t[mine] for name, t in batch.tensors().items()}
    batch = dataclasses.replace(batch, **share)
    trainer.zero()
    losses = trainer.backward(batch, LossTerms(counts, mtp_weight, BALANCE_ALPHA, 1 / trainer.data_ranks))
    norm = trainer.finish(MAX_GRAD_NORM)
    if math.isfinite(norm):
        trainer.update(LR, LR)
        trainer.average()
        trainer.balance(BIAS_SPEED)
    else:
        trainer.forget_loads()
    return [*losses.tolist(), norm]


def trained(layout: Layout, way: Way, out: str) -> None:
    """Trains on every rank; rank 0 writes the numbers and all router biases."""
    if way.compile:
        warnings.simplefilter("default")  # torch's compiler calls functions that torch has deprecated
    many = on_many(layout, way)
    numbers = continued(many, way, 0, STEPS)
    biases = {n: t.tolist() for n, t in many.state().items() if n.endswith("router.bias")}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, biases)
    if dist.get_rank() == 0:
        assert all(some[name] == biases[name] for some in everyone for name in some if name in biases)
        merged = {name: bias for some in everyone for name, bias in some.items()}
        Path(out).write_text(json.dumps([numbers, merged]))


def agrees(one: dict[Way, tuple[Numbers, dict[str, Tensor]]], layout: Layout, tmp_path: Path, way: Way = Way()) -> None:
    """Checks that a layout trains like one rank, whose numbers `one` caches for other layouts."""
    if way not in one:
        one[way] = on_one(way)
    numbers, state = one[way]
    on_ranks(layout.ranks, trained, layout, way, str(tmp_path / "out.json"))
    found, biases = json.loads((tmp_path / "out.json").read_text())
    check(found, numbers)
    assert biases.keys() == {f"model.{n}" for n in state if n.endswith("router.bias")}
    for name, bias in biases.items():
        torch.testing.assert_close(torch.tensor(bias), state[name.removeprefix("model.")], atol=1e-6, rtol=0)


def pipeline(schedule: Any, **more: Any) -> Layout:
    """A pipeline of two ranks, unless `more` says otherwise."""
    return Layout(**{"pp": 2, "micro_batches": 4, "schedule": schedule} | more)


def check(found: Numbers, expected: Numbers) -> None:
    """Checks losses and the gradient norm within 1e-5."""
    off = (torch.tensor(found) - torch.tensor(expected)).abs().amax(dim=0)
    assert off.max() <= 1e-5, off
