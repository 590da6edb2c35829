"""Memory of a rank: a synthetic checkpoint is streamed in, trained for two steps and exported, by one rank and by FSDP2 on several.

Random numbers in Hugging Face's form, 2 GB of fp32 by default. Peaks are resident memory above that of the process
after its imports and the ranks' first barrier. The export of the ranks has to load in transformers with finback's
logits, and its tensors are compared with those of the one-rank export. A temporary folder holds the checkpoints: three
times the size.

Rounding decides a router's near ties, so tokens that went to other experts than on one rank are listed. If there are
any, one rank trains again with the ranks' choices: the remaining difference of the losses has other causes.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import torch
import torch.distributed as dist
from layouts import taken, ties, watch
from torch import Tensor

from finback.checkpoint import export as one_rank
from finback.checkpoint import models
from finback.checkpoint.audit import shapes
from finback.checkpoint.shards import SINGLE, Shards
from finback.checkpoint.tensor_file import TensorFile
from finback.model.config import TINY, ModelConfig
from finback.model.moe import Router
from finback.model.replace import recast
from finback.model.transformer import Transformer
from finback.parallel.build import shares
from finback.parallel.export import export_shares
from finback.parallel.launch import free_port
from finback.parallel.layout import Layout
from finback.parallel.mesh import World
from finback.train.batch import of_windows
from finback.train.loss import LossTerms
from finback.train.optim import Adam, Muon, is_matrix
from finback.train.sharded_options import ShardedOptions
from finback.train.sharded_trainer import ShardedTrainer
from finback.train.trainer import ReplicatedTrainer, Trainer

ROWS, SEQ_LEN, STEPS, LR = 8, 16, 2, 1e-4
LIMIT = 0.35
Choices = list[dict[str, tuple[Tensor, Tensor]]]  # of each step, by router, as layouts.taken returns them


def config(layers: int, experts: int) -> ModelConfig:
    """V3's architecture without MTP; about 107 MB a layer of 64 experts in fp32."""
    sizes: dict[str, Any] = {
        **{"hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 128, "n_routed_experts": experts},
        **{"num_attention_heads": 8, "q_lora_rank": 256, "kv_lora_rank": 128},
        **{"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64},
        **{"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 1},
        **{"num_hidden_layers": layers, "num_nextn_predict_layers": 0, "vocab_size": 8192},
    }
    return dataclasses.replace(TINY, **sizes, initializer_range=0.02)


def make(folder: Path, c: ModelConfig) -> None:
    """Writes the checkpoint, with one tensor in memory at a time."""
    wanted = shapes(c)
    folder.mkdir()
    file = TensorFile(folder / SINGLE, {name: (torch.float32, shape) for name, shape in wanted.items()})
    generator = torch.Generator().manual_seed(1)
    for name, shape in wanted.items():
        values = torch.empty(shape).normal_(0, 0.02, generator=generator)
        file.write(name, values + 1 if name.endswith("norm.weight") else values)
    file.close()
    (folder / "config.json").write_text(json.dumps(one_rank.config_json(c, "fp32", None)))


class GivenRouter(Router):
    """A router with given choices (n, k) for each step."""

    given: list[Tensor]

    def select(self, affinity: Tensor, tokens: Tensor | None = None) -> Tensor:
        return self.given.pop(0)


def train(trainer: Trainer, config: ModelConfig, models: list[Transformer]) -> tuple[list[float], Choices]:
    """Losses of the steps, and what the routers chose."""
    generator, losses, chosen, routers = torch.Generator().manual_seed(2), [], [], watch(models)
    for windows in torch.randint(0, config.vocab_size, (STEPS, ROWS, SEQ_LEN + 1), generator=generator):
        batch = of_windows(windows[trainer.data_rank :: trainer.data_ranks], 0)
        trainer.zero()
        found = trainer.backward(batch, LossTerms([float(ROWS * SEQ_LEN)], row_share=1 / trainer.data_ranks))
        trainer.finish(1.0)
        trainer.update(LR, LR)
        trainer.balance(0.001)
        losses.append(found[0].item())
        chosen.append(taken(routers, len(batch.tokens)))
    return losses, chosen


def on_one(folder: Path, out: Path, optimizer: str, given: Path | None) -> tuple[list[float], Choices]:
    """Imports, trains and exports like a stage without a layout."""
    model = models.load(folder).train()
    if given is not None:
        choices = torch.load(given)
        for name, router in [(n, m) for n, m in model.named_modules() if isinstance(m, Router)]:
            recast(router, GivenRouter).given = [step[name] for step in choices]
    named = list(model.named_parameters())
    matrices = [(n, p) for n, p in named if is_matrix(n, p)]
    first = Muon(matrices, World()) if optimizer == "muon" else Adam(matrices, (0.9, 0.95), 0.05)
    adam = Adam([(n, p) for n, p in named if not is_matrix(n, p)], (0.9, 0.95), 0.0)
    found = train(ReplicatedTrainer(model, World(), (first, adam)), model.config, [model])
    one_rank.export(model, out, "fp32")
    return found


def on_many(folder: Path, out: Path, optimizer: str) -> tuple[list[float], Choices]:
    """Imports, trains and exports like a stage with a layout."""
    c, values = models.stored(folder)
    options = ShardedOptions(optimizer="muon" if optimizer == "muon" else "adamw")
    trainer = ShardedTrainer(c, Layout(dp=dist.get_world_size()), ROWS, values, options)
    found = train(trainer, c, trainer.models)
    export_shares(c, shares(trainer.models, trainer.mesh), out, "fp32")
    return found


def child(folder: Path, out: Path, optimizer: str, rank: int, ranks: int, given: Path | None) -> None:
    """Runs one rank; prints its figures, and writes its routers' choices next to its export."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
        dist.barrier()
    before, begin = record.resident("VmRSS"), time.perf_counter()
    losses, chosen = on_one(folder, out, optimizer, given) if ranks == 1 else on_many(folder, out, optimizer)
    peak = record.resident("VmHWM") - before
    torch.save(chosen, out.with_suffix(f".{rank}"))
    print(json.dumps({"peak": peak, "before": before, "losses": losses, "seconds": time.perf_counter() - begin}))


def measure(folder: Path, out: Path, optimizer: str, ranks: int, given: Path | None = None) -> list[dict[str, Any]]:
    """The figures of all ranks."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    environment = os.environ | meet | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", str(folder), str(out), optimizer]
    children = [
        subprocess.Popen([*command, str(rank), str(ranks), str(given or "")], env=environment, stdout=subprocess.PIPE)
        for rank in range(ranks)
    ]
    found = [process.communicate()[0] for process in children]
    assert all(process.returncode == 0 for process in children), "a rank failed"
    return [dict(json.loads(text.splitlines()[-1])) for text in found]


def ties_of(folder: Path, optimizer: str, one: list[float], many: list[float], ranks: int) -> dict[str, Any]:
    """Tokens that the ranks sent to other experts than one rank did, and losses of one rank that repeats their choices."""
    here: Choices = torch.load(folder / "one.0")
    there: list[Choices] = [torch.load(folder / f"many.{rank}") for rank in range(ranks)]
    theirs = [[{name: index for name, (index, _) in step.items()} for step in chosen] for chosen in there]
    elsewhere = ties(here, [((rank, 0), chosen, {}) for rank, chosen in enumerate(theirs)], ranks)
    found: dict[str, Any] = {"tokens_elsewhere": len(elsewhere), "ties": elsewhere[:20]}
    if elsewhere:
        # row r of a step is row r // ranks of data rank r % ranks
        rows = [{name: torch.stack([c[s][name] for c in theirs], 1) for name in theirs[0][s]} for s in range(STEPS)]
        torch.save([{name: t.flatten(0, 2) for name, t in step.items()} for step in rows], folder / "given.pt")
        [again] = measure(folder / "start", folder / "again", optimizer, 1, folder / "given.pt")
        found["losses_of_one_rank_with_their_choices"] = again["losses"]
        found["largest_loss_difference_then"] = farthest(again["losses"], many)
    return {"largest_loss_difference": farthest(one, many), **found}


def farthest(ours: list[float], theirs: list[float]) -> float:
    """The largest difference of losses."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def largest_difference(one: Path, other: Path) -> float:
    """The largest difference over all tensors of two exports."""
    ours, theirs = Shards(one), Shards(other)
    assert ours.specs.keys() == theirs.specs.keys(), "other tensors"
    return max((ours.read(name) - theirs.read(name)).abs().max().item() for name in ours.specs)


def loads(folder: Path) -> float:
    """Largest difference between transformers' and finback's logits of an export."""
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(64)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        model = models.load(folder).eval()
        return float((model.logits(model(tokens)) - theirs).abs().max())


def main() -> None:
    """Measures and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=19)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="of hidden matrices")
    parser.add_argument("--folder", type=Path, help="where the temporary checkpoints are written")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = record.header(
        "shares",
        {name: getattr(options, name) for name in ("layers", "experts", "ranks", "optimizer")}
        | {"rows": ROWS, "seq_len": SEQ_LEN, "steps": STEPS},
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        make(folder / "start", config(options.layers, options.experts))
        results["checkpoint_bytes"] = size = (folder / "start" / SINGLE).stat().st_size
        [one] = measure(folder / "start", folder / "one", options.optimizer, 1)
        many = measure(folder / "start", folder / "many", options.optimizer, options.ranks)
        peak = max(rank["peak"] for rank in many)
        results |= {
            "one_rank": one,
            "ranks": many,
            "one_rank_over_checkpoint": one["peak"] / size,
            "rank_over_one_rank": peak / one["peak"],
            "limit": LIMIT,
            "memory_holds": peak <= LIMIT * one["peak"],
            **ties_of(folder, options.optimizer, one["losses"], many[0]["losses"], options.ranks),
            "largest_weight_difference": largest_difference(folder / "one", folder / "many"),
            "largest_logit_difference_to_transformers": loads(folder / "many"),
            "files": sorted(path.name for path in (folder / "many").glob("*.safetensors")),
        }
    print(json.dumps(results, indent=1))
    record.write(results, options.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        start, export, optimizer, rank, ranks, given = sys.argv[2:]
        child(Path(start), Path(export), optimizer, int(rank), int(ranks), Path(given) if given else None)
    else:
        main()
