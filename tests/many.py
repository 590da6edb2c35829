"""What the tests of many ranks share: a model with experts, and processes that meet over gloo."""

import dataclasses
import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finback.model.config import ModelConfig
from finback.model.transformer import Transformer
from finback.parallel.launch import free_port
from finback.parallel.layout import Layout
from finback.parallel.mesh import World
from finback.train.batch import of_windows
from finback.train.loss import LossTerms
from finback.train.optim import Adam, Gradients, Muon, is_matrix
from finback.train.sharded_trainer import ShardedTrainer
from tests.toy import CONFIG, backward

MANY = dataclasses.replace(
    CONFIG, num_hidden_layers=4, n_routed_experts=8, n_group=2, topk_group=1, initializer_range=0.15
)

SHAPE = ROWS, SEQ_LEN = 8, 16
MTP_WEIGHT, BALANCE_ALPHA, BIAS_SPEED, MAX_GRAD_NORM = 0.3, 0.05, 0.02, 1.0
LR = 3e-3
Numbers = list[list[float]]  # of each step: loss, MTP loss, balance loss, norm of the gradient
IMPORTED = [f"torch.distributed.{n}" for n in ("fsdp", "pipelining", "checkpoint")] + ["tests.many"]


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Run work(*arguments) in `ranks` processes that know each other; fails when one of them does."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(IMPORTED)  # once for all tests: it takes longer than most of them
    children = [context.Process(target=_run, args=(r, ranks, port, work, arguments)) for r in range(ranks)]
    for child in children:
        child.start()
    for child in children:
        child.join(240)
    hung = [child for child in children if child.is_alive()]
    for child in hung:
        child.kill()
    assert not hung and all(child.exitcode == 0 for child in children), [c.exitcode for c in children]


def _run(rank: int, ranks: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    work(*arguments)
    dist.destroy_process_group()


def batches(config: ModelConfig, steps: int) -> Iterator[Tensor]:
    """All rows of each step, the same for all who ask."""
    generator = torch.Generator().manual_seed(6)
    width = SEQ_LEN + 1 + config.num_nextn_predict_layers
    yield from torch.randint(0, 320, (steps, ROWS, width), generator=generator)


def on_one(config: ModelConfig, steps: int = 20) -> tuple[Numbers, dict[str, Tensor]]:
    """The plain twin: backward, Muon, AdamW and the bias update on one rank, as one thread like each of many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = Transformer(config).initialise(5).train()
    named = list(model.named_parameters())
    gradients = Gradients([p for _, p in named])
    muon = Muon([(n, p) for n, p in named if is_matrix(n, p)], World())
    adam = Adam([(n, p) for n, p in named if not is_matrix(n, p)], (0.9, 0.95), 0.0)
    numbers = []
    for batch in batches(config, steps):
        gradients.zero()
        losses = backward(model, batch, MTP_WEIGHT, BALANCE_ALPHA)
        norm = gradients.finish(World(), MAX_GRAD_NORM)
        muon.step(LR)
        adam.step(LR)
        for router in model.routers():
            router.update_bias(BIAS_SPEED)
        numbers.append([losses.main.item(), losses.mtp.item(), losses.balance.item(), norm])
    torch.set_num_threads(threads)
    return numbers, model.state_dict()


def continued(many: ShardedTrainer, begin: int, end: int) -> Numbers:
    """The same on many ranks, steps begin..end."""
    numbers = []
    for index, batch in enumerate(batches(many.config, end)):
        if index >= begin:
            numbers.append(step(many, batch))
    return numbers


def step(many: ShardedTrainer, windows: Tensor, mtp_weight: float = MTP_WEIGHT) -> list[float]:
    """One step on a step's rows: losses over all ranks, norm of the gradient; none where that is not finite."""
    counts = [float(ROWS * SEQ_LEN)] * (1 + many.config.num_nextn_predict_layers)
    batch = of_windows(windows[many.data_rank :: many.data_ranks], many.config.num_nextn_predict_layers)
    many.zero()
    losses = many.backward(batch, LossTerms(counts, mtp_weight, BALANCE_ALPHA, 1 / many.data_ranks))
    norm = many.finish(MAX_GRAD_NORM)
    if math.isfinite(norm):
        many.update(LR, LR)
        many.balance(BIAS_SPEED)
    else:
        many.forget_loads()
    return [*losses.tolist(), norm]


def pipeline(schedule: Any, **more: Any) -> Layout:
    """Two ranks in a row, unless `more` says otherwise."""
    return Layout(**{"pp": 2, "micro_batches": 4, "schedule": schedule} | more)


def check(found: Numbers, expected: Numbers) -> None:
    """Losses within 1e-5; gradients are a thousand sums and a little further apart."""
    off = (torch.tensor(found) - torch.tensor(expected)).abs().amax(dim=0)
    assert off[:3].max() <= 1e-5 and off[3] <= 1e-4, off
