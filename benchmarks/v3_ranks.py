"""Compares the small recipes/v3.py on four ranks and on one: losses, norms, loads and router biases of every step of every phase.

    python benchmarks/v3_ranks.py            # --folder FOLDER (kept, and resumed from), --compute, --out FILE

Runs `finback run recipes/v3.py --set size=tiny` on one rank without layouts and on four with them, in fp32 and in
emulated FP8: a ramp of the batch, schedules of rate, MTP and biases, FIM, an average, then two extensions whose rows
are split over ranks. In fp32 everything agrees within 1e-5. If a router's choice is so nearly tied that rounding
decides it, AdamW amplifies the difference in later steps; so choices are compared as in layouts.py, tokens that went to
other experts are listed, and the comparison ends before the first of them, which must be such a tie.

In FP8 the losses of the first step agree within 1e-5 as well. From its gradients on they cannot: weights' gradients are
rounded in tiles of tokens, and on four ranks a tile has other tokens. They stay within three times what FP8 itself
makes of fp32 on one rank.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import layouts
import record
import torch
from driver import say

from finback.parallel import launch
from finback.parallel.execute import execute
from finback.runs import recipe as recipes
from finback.stages.pretraining import Pretraining
from finback.train.loop import Loop

ROOT = Path(__file__).parent.parent
PHASES = ("pretrain", "extend-32k", "extend-128k")
LIMIT = 1e-5
NOISE = 3  # FP8's difference between four ranks and one, over its difference from fp32 on one: the limit
SAME = ("tokens", "batch_size", "lr")  # equal to the bit
COMPARED = ("loss", "mtp_loss", "balance", "grad_norm", "load", "bias")


def settings(ranks: int, compute: str) -> list[str]:
    """Changes to the recipe: every step logs its routers, and fewer than four ranks hold whole copies."""
    changes = [f"{phase}.{knob}" for phase in PHASES for knob in (f"compute={compute}", "router_steps=1")]
    return ["size=tiny", *changes, *([f"{phase}.layout=none" for phase in PHASES] if ranks < 4 else [])]


def run(folder: Path, ranks: int, compute: str) -> Path:
    """Runs or resumes the recipe; text and tokens are prepared only once."""
    root = folder / f"{ranks}-{compute}" / "v3"
    if (root / "summary.json").is_file() and len(json.loads((root / "summary.json").read_text())["stages"]) > len(
        PHASES
    ):
        return root
    prepared = [other for other in folder.glob("*/v3") if (other / "prepare/manifest.json").is_file()]
    if not root.is_dir() and prepared:
        root.mkdir(parents=True)
        shutil.copytree(prepared[0] / "prepare", root / "prepare")
        shutil.copy(prepared[0] / "recipe.json", root)
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch.free_port())}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | meeting
    command = [sys.executable, __file__, "--rank", str(root), *settings(ranks, compute)]
    children = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in range(ranks)]
    codes = [child.wait() for child in children]
    assert not any(codes), f"{ranks} ranks, {compute}: exit codes {codes}"
    return root


def on_rank(root: Path, changes: list[str]) -> None:
    """Runs the recipe as one rank, and records its routers' choices."""
    step, finish = Pretraining.step, Pretraining.finish
    chosen: list[dict[str, Any]] = []
    routers: dict[str, Any] = {}

    def watched(self: Pretraining, loop: Loop) -> dict[str, Any]:
        if not routers:
            routers.update(layouts.watch(getattr(self.trainer, "models", [self.trainer.model])))
        metrics = step(self, loop)
        chosen.append(layouts.taken(routers, metrics["batch_size"] // self.trainer.data_ranks))
        return metrics

    def ended(self: Pretraining, loop: Loop) -> dict[str, Any]:
        mesh = getattr(self.trainer, "mesh", None)
        context = mesh.cp.get_local_rank() if mesh is not None and mesh.cp is not None else 0
        where = root.parent / f"{self.stage.name}-{self.world.rank}.pt"
        torch.save(((self.trainer.data_rank, context), self.trainer.data_ranks, list(chosen)), where)
        chosen.clear()
        routers.clear()
        return finish(self, loop)

    Pretraining.step, Pretraining.finish = watched, ended  # type: ignore[method-assign]
    execute(recipes.load(ROOT / "recipes/v3.py", changes), root, 0)


def steps(root: Path, phase: str) -> list[dict[str, Any]]:
    """Each step's metrics, with the loads and biases of all routers."""
    logs = [
        (root / phase / name).read_text(encoding="utf-8").splitlines() for name in ("metrics.jsonl", "router.jsonl")
    ]
    metrics, routers = (list(map(json.loads, log)) for log in logs)
    return [{**m, "load": r["load"], "bias": r["bias"]} for m, r in zip(metrics, routers, strict=True)]


def apart(one: Path, other: Path, phase: str, before: float = math.inf) -> dict[str, float]:
    """The largest difference of each quantity over a phase's steps before `before`; asserts that SAME are equal."""
    found = dict.fromkeys(COMPARED, 0.0)
    for a, b in zip(steps(one, phase), steps(other, phase), strict=True):
        assert all(a[name] == b[name] for name in SAME), (a, b)
        for name in COMPARED if a["step"] < before else ():
            found[name] = max([found[name], *(abs(x - y) for x, y in zip(_flat(a[name]), _flat(b[name]), strict=True))])
    return found


def _flat(value: Any) -> list[float]:
    return [x for row in value for x in row] if isinstance(value, list) else [value]


def elsewhere(one: Path, other: Path, phase: str) -> tuple[list[dict[str, Any]], int]:
    """Tokens that went to other experts than on one rank, and the number of near ties there."""
    [(_, _, whole)] = [torch.load(one.parent / f"{phase}-0.pt")]
    ranks = [torch.load(path) for path in sorted(other.parent.glob(f"{phase}-*.pt"))]
    indices: list[Any] = [
        (at, [{name: seen[0] for name, seen in step.items()} for step in found], {}) for at, _, found in ranks
    ]
    near = sum(int((margin < layouts.NEAR).sum()) for step in whole for _, margin in step.values())
    return layouts.ties(whole, indices, ranks[0][1]), near


def compared(folder: Path, compute: str) -> list[dict[str, Any]]:
    """A line for each phase: the differences between four ranks and one, and their limits."""
    one, four = run(folder, 1, compute), run(folder, 4, compute)
    exact = run(folder, 1, "fp32") if compute == "fp8" else None
    lines: list[dict[str, Any]] = []
    tied = False
    for phase in PHASES:
        line: dict[str, Any] = {"phase": phase, "compute": compute, "steps": len(steps(one, phase))}
        if exact is None:
            moved, line["near_ties_on_one_rank"] = elsewhere(one, four, phase)
            first = 0 if tied else min((tie["step"] for tie in moved), default=math.inf)
            is_tie = tied or all(tie["won_by"] < layouts.NEAR for tie in moved if tie["step"] == first)
            tied = tied or bool(moved)
            line |= {"tokens_elsewhere": len(moved), "ties": moved[:5], "judged_before_step": first if tied else None}
            off, limit = apart(one, four, phase, first), dict.fromkeys(COMPARED, LIMIT if is_tie else 0.0)
            line["all_steps"] = apart(one, four, phase)
        else:
            off, noise = apart(one, four, phase), apart(one, exact, phase)
            limit = {name: NOISE * noise[name] for name in COMPARED}
            if phase == PHASES[0]:
                line["first_step"] = begin = apart(one, four, phase, before=2)
                limit |= {name: 0.0 for name in ("loss", "mtp_loss", "balance") if begin[name] > LIMIT}
        holds = all(off[name] <= limit[name] for name in COMPARED)
        lines.append(line | {**off, "limit": limit, "holds": holds})
        say(f"{compute} {phase:12} {'holds' if holds else 'DOES NOT HOLD'} {off} {line.get('tokens_elsewhere', '')}")
    return lines


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        return on_rank(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder of the runs; default: a temporary one")
    parser.add_argument("--compute", choices=("fp32", "fp8"), help="only this precision")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "v3_ranks.json")
    options = parser.parse_args()
    computes = [options.compute] if options.compute else ["fp32", "fp8"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        results = record.header("v3_ranks", {"limit": LIMIT, "noise": NOISE, "near": layouts.NEAR})
        table = [line for compute in computes for line in compared(folder, compute)]
    record.write(results | {"holds": all(line["holds"] for line in table), "table": table}, options.out)
    return None


if __name__ == "__main__":
    main()
