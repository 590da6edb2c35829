"""Compares every layout of a model on ranks with one rank: losses, gradient norms, router biases, and ties of routers.

    python benchmarks/layouts.py            # --only PATTERN, --again, --steps, --out FILE

Each line of the results is written when it is finished, and lines that already hold are skipped unless --again is
given. A table of layouts (pp x dp x ep x sharding x schedule, with document masks or without, in fp32 and in emulated
FP8) trains a tiny mixture of experts for 20 steps over gloo, as tests/many.py does, and is compared step by step with
one rank. Within 1e-5 in fp32; in FP8 within three times the noise that another order of the rows makes on one rank.

If a router's choice is nearly a tie, rounding decides it, and a loss may differ by more. So every choice is compared as
well: a token that went to other experts is listed with its step, layer, row, position, and the margin of the choice on
one rank.
"""

import argparse
import dataclasses
import fnmatch
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import record
import torch
import torch.distributed as dist
from driver import say
from torch import Tensor

from finback.model.moe import Router
from finback.model.replace import recast
from finback.model.transformer import Transformer
from finback.parallel.layout import Layout, Sharding
from finback.parallel.schedules import ScheduleName
from tests.many import STEPS, Numbers, Way, batches, on_many, on_ranks, one_rank, step

LIMIT = 1e-5  # of losses and norms in fp32
NEAR = 1e-6  # a choice with a smaller margin counts as a near tie
PIPELINES: tuple[ScheduleName, ...] = ("1f1b", "zb1p", "interleaved", "zbv", "dualpipev")
SHARDINGS: tuple[Sharding, ...] = ("fsdp", "zero1")


class WatchedRouter(Router):
    """A router that records its choices in training, and their margins."""

    seen: list[tuple[Tensor, Tensor]]

    def select(self, affinity: Tensor, tokens: Tensor | None = None) -> Tensor:
        index = super().select(affinity, tokens)
        if self.training:
            self.seen.append((index.sort(dim=-1).values, won_by(self, affinity, index)))
        return index


def won_by(router: Router, affinity: Tensor, index: Tensor) -> Tensor:
    """Affinity (n, experts), choices (n, k) -> (n,): how much a bias or an affinity would have to move for another choice.

    The smaller of two margins: of the last chosen expert over the first other one in the admitted groups, and of the last
    admitted group over the first other one.
    """
    c, biased = router.config, affinity + router.bias
    rest = biased.scatter(1, index, float("-inf")).unflatten(1, (c.n_group, -1))
    groups = biased.unflatten(1, (c.n_group, -1)).topk(2, dim=-1).values.sum(dim=-1)
    order = groups.argsort(dim=-1, descending=True)
    if c.topk_group == c.n_group:
        return biased.gather(1, index).amin(dim=1) - rest.flatten(1).amax(dim=1)
    open_ = torch.zeros_like(groups, dtype=torch.bool).scatter(1, order[:, : c.topk_group], True)
    rest = rest.masked_fill(~open_[:, :, None], float("-inf")).flatten(1)
    ranked = groups.gather(1, order)
    between = ranked[:, c.topk_group - 1] - ranked[:, c.topk_group]
    return torch.minimum(biased.gather(1, index).amin(dim=1) - rest.amax(dim=1), between)


def watch(models: list[Transformer]) -> dict[str, WatchedRouter]:
    """The routers of a model's stages by name, recorded from now on."""
    found = {}
    for model in models:
        for name, module in model.named_modules():
            if isinstance(module, Router):
                found[name] = recast(module, WatchedRouter)
                found[name].seen = []
    return found


def taken(routers: dict[str, WatchedRouter], rows: int) -> dict[str, tuple[Tensor, Tensor]]:
    """What was recorded since the last call: choices (rows, tokens, k), and their margins (rows, tokens)."""
    found = {}
    for name, router in routers.items():
        index, margin = (torch.cat(parts) for parts in zip(*router.seen, strict=True))
        router.seen.clear()
        found[name] = index.unflatten(0, (rows, -1)), margin.unflatten(0, (rows, -1))
    return found


@dataclasses.dataclass(frozen=True)
class Case:
    """A line of the table."""

    layout: Layout
    way: Way

    @property
    def name(self) -> str:
        plain = vars(Layout())
        changed = [f"{k}={v}" for k, v in vars(self.layout).items() if v != plain[k] and k != "micro_batches"]
        return " ".join([*changed, *["masks"] * self.way.packed, *["fp8"] * (self.way.compute == "fp8")])


def table() -> Iterator[Case]:
    """All layouts in fp32, every other one with masks as well, every fourth one in FP8 as well."""
    layouts = [Layout(dp=2, ep=ep, sharding=s) for ep in (1, 2) for s in SHARDINGS]
    layouts += [Layout(dp=4, ep=ep, sharding=s, micro_batches=2) for ep in (1, 2, 4) for s in SHARDINGS]
    layouts += [Layout(dp=4, ep=4, nodes=2)]
    layouts += [
        Layout(pp=2, schedule=schedule, micro_batches=4, sharding=s) for schedule in PIPELINES for s in SHARDINGS
    ]
    layouts += [
        Layout(pp=2, dp=2, ep=ep, schedule=schedule, micro_batches=4, sharding=s)
        for schedule in PIPELINES
        for ep, s in zip((2, 1), SHARDINGS, strict=True)
    ]
    layouts += [Layout(pp=4, schedule=schedule, micro_batches=8) for schedule in ("1f1b", "zb1p")]
    layouts += [Layout(cp=2, sharding=s) for s in SHARDINGS]
    layouts += [Layout(dp=2, cp=2), Layout(dp=2, cp=2, ep=4)]
    layouts += [Layout(pp=2, cp=2, micro_batches=4, schedule=schedule) for schedule in PIPELINES]
    for number, layout in enumerate(layouts):
        yield Case(layout, Way())
        if number % 2 == 0:
            yield Case(layout, Way(packed=True))
        if number % 4 == 0:
            yield Case(layout, Way(compute="fp8", packed=number % 8 == 0))


def on_rank(case: Case, steps: int, out: str) -> None:
    """Trains on this rank; rank 0 writes numbers, biases and all choices."""
    many = on_many(case.layout, case.way)
    routers, rows = watch(many.models), max(case.way.rows) // many.data_ranks
    numbers, chosen = [], []
    for batch in batches(case.way, steps):
        numbers.append(step(many, batch))
        chosen.append({name: seen[0] for name, seen in taken(routers, rows).items()})
    biases = {name.removesuffix(".bias"): bias for name, bias in many._biases().items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    context = 0 if many.mesh.cp is None else many.mesh.cp.get_local_rank()
    dist.all_gather_object(everyone, ((many.data_rank, context), chosen, biases))
    if dist.get_rank() == 0:
        torch.save((numbers, everyone), out)


def alone(way: Way, steps: int) -> tuple[Numbers, list[dict[str, tuple[Tensor, Tensor]]], dict[str, Tensor]]:
    """One rank's numbers, choices with their margins, and biases."""
    trainer = one_rank(way)
    routers, numbers, chosen = watch([trainer.model]), [], []
    for batch in batches(way, steps):
        numbers.append(step(trainer, batch))
        chosen.append(taken(routers, len(batch.tokens)))
    return numbers, chosen, {name: router.bias.clone() for name, router in routers.items()}


def ties(one: list[dict[str, tuple[Tensor, Tensor]]], everyone: list[Any], ranks: int) -> list[dict[str, Any]]:
    """Every token that went to other experts than on one rank."""
    found = []
    for (data_rank, context), chosen, _ in everyone:
        for number, (here, whole) in enumerate(zip(chosen, one, strict=True)):
            for layer, index in here.items():
                tokens = slice(
                    context * index.size(1), (context + 1) * index.size(1)
                )  # this rank's part of a split row
                expected, margin = (t[data_rank::ranks, tokens] for t in whole[layer])
                for row, token in (index != expected).any(dim=-1).nonzero().tolist():
                    there = {"experts": index[row, token].tolist(), "on_one_rank": expected[row, token].tolist()}
                    place = {
                        "step": number + 1,
                        "layer": layer,
                        "row": data_rank + ranks * row,
                        "token": tokens.start + token,
                    }
                    found.append({**place, **there, "won_by": margin[row, token].item()})
    return sorted(found, key=lambda tie: (tie["step"], tie["layer"], tie["row"], tie["token"]))


def compared(case: Case, steps: int, known: dict[Any, Any]) -> dict[str, Any]:
    """Runs a line of the table; `known` caches one rank's results."""
    way = case.way
    for each in (way, dataclasses.replace(way, reversed=True))[: 2 if way.compute == "fp8" else 1]:
        if each not in known:
            known[each] = alone(each, steps)
    numbers, chosen, biases = known[way]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out.pt")
        on_ranks(case.layout.ranks, on_rank, case, steps, out)
        found, everyone = torch.load(out)
    off = (torch.tensor(found) - torch.tensor(numbers)).abs().amax(dim=0)
    bias = max((b - biases[name]).abs().max().item() for _, _, held in everyone for name, b in held.items())
    limit = torch.full((4,), LIMIT)
    if way.compute == "fp8":
        limit = 3 * (
            torch.tensor(known[dataclasses.replace(way, reversed=True)][0]) - torch.tensor(numbers)
        ).abs().amax(0)
    elsewhere = ties(chosen, everyone, case.layout.dp) if way.compute == "fp32" else []
    near = sum(int((margin < NEAR).sum()) for at in chosen for _, margin in at.values())
    losses = dict(zip(("loss", "mtp_loss", "balance", "grad_norm"), off.tolist(), strict=True))
    holds = bool((off <= limit).all()) and (way.compute == "fp8" or bias <= LIMIT)
    return {
        "name": case.name,
        "layout": vars(case.layout),
        "masks": way.packed,
        "compute": way.compute,
        **losses,
        "bias": bias,
        "limit": dict(zip(losses, limit.tolist(), strict=True)),
        "near_ties_on_one_rank": near,
        "tokens_elsewhere": len(elsewhere),
        "ties": elsewhere[:20],
        "holds": holds,
        "seconds": time.perf_counter() - begin,
    }


def earlier(out: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The lines that an earlier call with the same settings has written, by name."""
    if not out.is_file():
        return {}
    found = json.loads(out.read_text(encoding="utf-8"))
    same = {name: found["settings"].get(name) for name in settings} == settings
    return {line["name"]: line for line in found["table"]} if same else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="names of lines, with * and ?")
    parser.add_argument("--again", action="store_true", help="run lines again that already hold")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "layouts.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"steps": options.steps, "limit": LIMIT, "near": NEAR}
    results, lines = record.header("layouts", settings), earlier(options.out, settings)
    cases, known = {case.name: case for case in table()}, dict[Any, Any]()
    for name, case in cases.items():
        if not fnmatch.fnmatch(name, options.only) or (name in lines and lines[name]["holds"] and not options.again):
            continue
        try:
            lines[name] = compared(case, options.steps, known)
        except AssertionError as error:  # a rank has failed; the text says why
            lines[name] = {"name": name, "failed": str(error), "holds": False}
        line = lines[name]
        shown = line.get("failed") or f"loss {line['loss']:.1e} norm {line['grad_norm']:.1e} bias {line['bias']:.1e}"
        say(f"{name:70} {'holds' if line['holds'] else 'DOES NOT HOLD'} {shown} {line.get('tokens_elsewhere', '')}")
        ordered = [lines[name] for name in cases if name in lines]
        total = {"lines": len(ordered), "of": len(cases), "hold": sum(bool(at["holds"]) for at in ordered)}
        part = options.out.with_suffix(".part")
        part.write_text(json.dumps(results | {"total": total, "table": ordered}, indent=1) + "\n", encoding="utf-8")
        part.replace(options.out)


if __name__ == "__main__":
    main()
