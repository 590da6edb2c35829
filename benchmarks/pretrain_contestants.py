"""The contestants of the pre-training benchmark, and the work of their processes.

A step is everything training does: read rows, forward, backward, exchange between ranks, clip, optimiser.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import qualify
import torch
from driver import CORES, Contestant, Settings
from gemm import DTYPES, LAYOUTS
from sizes import SIZES
from torch import nn
from twin import count, twin

from finback.data.loader import Loader
from finback.model.config import ModelConfig
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.runs.folder import StageRun
from finback.stages.pretrain import Pretrain
from finback.stages.pretrain_setup import set_up
from finback.stages.pretraining import Pretraining
from finback.train.batch import of_rows

LENGTH = 128
# steps: oneDNN compiles bf16 products at the first use of a block size
WARMUP = {"tiny": 20, "10m": 12, "100m": 3}


def config_of(settings: Settings) -> ModelConfig:
    """A size with or without an MTP module; a smoke test takes fewer layers."""
    return dataclasses.replace(
        SIZES[settings["size"]],
        num_hidden_layers=settings["layers"],
        num_nextn_predict_layers=int(settings.get("mtp", False)),
    )


# finback's side


def finback_worker(pipe: Connection, settings: Settings) -> None:
    """The pre-training stage's own step."""
    world = World.join(settings["rank"], settings["ranks"])
    training = _training(settings, world)
    loop = training.loop()
    _serve(pipe, count(training.trainer.model), lambda: loop.advance()["loss"], WARMUP[settings["size"]])


def _stage_run(settings: Settings, world: World) -> StageRun:
    run = StageRun(Path(settings["folder"]), "base", 0, world, quiet=True)
    run.folder.mkdir(exist_ok=True)  # steps log what the routers do
    return run


def _training(settings: Settings, world: World) -> Pretraining:
    stage = Pretrain(
        name="base",
        data="prepare",
        model=config_of(settings),
        mixture={"chitchat": 1.0},
        batch_size=settings["rows"],
        seq_len=LENGTH,
        compute=settings["precision"],
        optimizer=settings["optimiser"],
        compile=settings["compile"],
        weights=settings["weights"],
    )
    if settings["optimiser"] == "adamw":  # at the peer's rate, for all parameters
        stage = dataclasses.replace(stage, adam_lr=1e-3)
    return set_up(stage, _stage_run(settings, world))


# transformers' side


def transformers_worker(pipe: Connection, settings: Settings) -> None:
    """DeepseekV3ForCausalLM with fused AdamW; among several ranks under DistributedDataParallel."""
    World.join(settings["rank"], settings["ranks"])
    model = _peer(settings)
    _serve(pipe, count(model), _peer_step(model, settings), WARMUP[settings["size"]])


def _peer(settings: Settings) -> nn.Module:
    chosen = settings["attention"], settings["experts"]
    torch.manual_seed(0)
    model: Any = twin(
        Transformer(config_of(settings)).initialise(_stage_run(settings, World()).seed("weights")),
        attn_implementation=chosen[0],
        experts_implementation=chosen[1],
        use_cache=False,
    ).train()
    taken = model.config._attn_implementation, model.config._experts_implementation
    assert taken == chosen, f"transformers took {taken} instead of {chosen}"
    if settings["precision"] == "bf16 weights":
        model = model.to(torch.bfloat16)
    assert isinstance(model, nn.Module)
    return model


def _peer_step(model: nn.Module, settings: Settings) -> Callable[[], float]:
    rank, ranks = settings["rank"], settings["ranks"]
    run = _stage_run(settings, World())
    loader = Loader(run.root / "prepare", {"chitchat": 1.0}, LENGTH, 1, run.seed("order"))
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    forward: nn.Module = torch.compile(model) if settings["compile"] else model  # type: ignore[assignment]
    if ranks > 1:
        forward = nn.parallel.DistributedDataParallel(forward, broadcast_buffers=False, gradient_as_bucket_view=True)
    autocast = settings["precision"] == "bf16 autocast"

    def step() -> float:
        batch = of_rows(loader.draw(settings["rows"], rank, ranks, document_ids=False), LENGTH)
        inputs, targets = batch.tokens.contiguous(), batch.labels.contiguous()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = forward(input_ids=inputs, labels=targets, shift_labels=targets).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss)

    return step


def _serve(pipe: Connection, parameters: int, step: Callable[[], float], warmup: int) -> None:
    """Warms up, reports the warm-up, then does steps on demand."""
    seconds, losses = [], []
    for _ in range(warmup):
        begin = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - begin)
    pipe.send(
        {
            "parameters": parameters,
            "first_loss": losses[0],
            "first_step_seconds": seconds[0],
            "warm_step_seconds": seconds[-1],
        }
    )
    while True:
        pipe.send([step() for _ in range(pipe.recv())][-1])


# contestants


def finback_contestants(common: Settings) -> list[Contestant]:
    """Muon in every layout; the other settings in layouts that use all cores. Beyond the tiny size, ranks alone."""

    def entry(
        optimiser: str,
        precision: str,
        layout: tuple[int, int] = (CORES, 1),
        mtp: bool = False,
        compiled: bool = False,
        weights: str = "fp32",
    ) -> Contestant:
        ranks, threads = layout
        form = "bf16 weights" if weights == "bf16" else precision
        words = [optimiser, *(["+ MTP"] if mtp else []), form, *(["compile"] if compiled else [])]
        name = f"finback {' '.join(words)} {ranks}x{threads}"
        own = {"optimiser": optimiser, "precision": precision, "mtp": mtp, "compile": compiled, "weights": weights}
        return Contestant(name, finback_worker, common | own, ranks, threads)

    # like the peer's bf16 weights: without fp32 masters of hidden matrices
    narrow = [entry("adamw", "bf16", compiled=compiled, weights="bf16") for compiled in (False, True)]
    if common["size"] != "tiny":
        kinds = [("adamw", False), ("muon", False), ("adamw", True)]
        return [*(entry(o, p, compiled=c) for o, c in kinds for p in DTYPES if p == "bf16" or not c), *narrow]
    found = []
    for precision in DTYPES:
        found += [entry("muon", precision, layout) for layout in LAYOUTS]
        found += [entry("adamw", precision, layout) for layout in LAYOUTS if layout != (1, 1) or CORES == 1]
    found += [entry(optimiser, "bf16", compiled=True) for optimiser in ("adamw", "muon")]
    found.append(entry("muon", "bf16", mtp=True))
    return [*found, *narrow]


def peer(
    common: Settings, precision: str, attention: str, experts: str, compiled: bool = False, ranks: int = 1
) -> Contestant:
    """One setting of transformers: all threads, or as many one-thread ranks as there are cores."""
    threads = CORES if ranks == 1 else 1
    words = [precision, attention, experts, *(["compile"] if compiled else []), f"{ranks}x{threads}"]
    settings = common | {"precision": precision, "attention": attention, "experts": experts, "compile": compiled}
    return Contestant(f"transformers {' '.join(words)}", transformers_worker, settings, ranks, threads)


def eager_peers(common: Settings, thorough: bool) -> list[Contestant]:
    """Attention by sdpa or eager, experts in each implementation that runs on a CPU, three precisions.

    Beyond the tiny size without those that are far behind there.
    """
    choices = [
        ("fp32", "sdpa", "grouped_mm"),
        ("fp32", "eager", "grouped_mm"),
        ("fp32", "sdpa", "eager"),
        ("fp32", "sdpa", "batched_mm"),
        ("bf16 autocast", "sdpa", "grouped_mm"),
        ("bf16 autocast", "eager", "grouped_mm"),
        ("bf16 weights", "sdpa", "grouped_mm"),
        ("bf16 weights", "eager", "grouped_mm"),
    ]
    if thorough:
        choices += [("bf16 autocast", "sdpa", "eager"), ("bf16 weights", "sdpa", "eager")]
    if common["size"] != "tiny" and not thorough:
        choices = [choice for choice in choices if choice[2] == "grouped_mm" and choice[0] != "fp32"]
    return [peer(common, *choice) for choice in choices]


def compiled_peers(common: Settings, thorough: bool) -> list[Contestant]:
    """torch.compile with the attention that it can fuse; when thorough, with sdpa and in fp32 as well."""
    attentions = ("eager", "sdpa") if thorough else ("eager",)
    precisions = ("bf16 autocast", "bf16 weights", *(("fp32",) if thorough else ()))
    return [
        peer(common, precision, attention, "grouped_mm", compiled=True)
        for attention in attentions
        for precision in precisions
    ]


def ranked_peers(common: Settings, single: Sequence[Contestant]) -> list[Contestant]:
    """The best settings of one process once more as one-thread ranks: fp32, bf16, and compiled."""
    kinds: list[Callable[[Contestant], bool]] = [
        lambda c: dtype_of(c) == "fp32" and not c.settings["compile"],
        lambda c: dtype_of(c) == "bf16" and not c.settings["compile"],
        lambda c: bool(c.settings["compile"]),
    ]
    found = []
    for belongs in kinds:
        champion = qualify.best([c for c in single if belongs(c)])
        if champion:
            s = champion.settings
            found.append(peer(common, s["precision"], s["attention"], s["experts"], s["compile"], CORES))
    return found if CORES > 1 else []


def dtype_of(contestant: Contestant) -> str:
    """fp32 or bf16."""
    return str(contestant.settings["precision"]).split()[0]
