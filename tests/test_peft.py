"""Adapters in PEFT's files against peft itself: an adapter written by either computes the same in the other."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from finback.checkpoint import models, peft_export
from finback.checkpoint.export import export
from finback.model.lora import AdaptedTransformer, LoRA, adapter_parameters
from finback.train.batch import of_windows
from finback.train.loss import LossTerms, training_losses
from finback.train.optim import Adam
from tests.test_lora import ROWS, adapted, base_of, logits
from tests.toy import ROOT

pytestmark = pytest.mark.slow
PYTHON = ROOT / ".venv/oracles/bin/python"
LR = 1e-3
STD = 0.06  # of the weights; with larger ones rounding in fp32 alone exceeds 1e-5
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def base(family: str, folder: Path) -> Path:
    if not folder.exists():
        export(base_of(family, std=STD), folder, "fp32")
    return folder


def asked(cases: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    if not PYTHON.exists():
        pytest.skip("peft is not installed; `make test-slow` installs it")
    given = json.dumps([{"ids": ROWS.tolist(), "lr": LR} | case for case in cases])
    script = ROOT / "tests/peft_oracle.py"
    done = subprocess.run([PYTHON, script], input=given, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(Path(case["out"]) / "answer.safetensors") for case in cases]


def answered(model: AdaptedTransformer) -> dict[str, Tensor]:
    """The oracle's answer computed by finback, under PEFT's names."""
    found = {"logits": logits(model.eval())}
    batch = of_windows(ROWS, 0)
    terms = LossTerms([float(batch.learnt.sum())], 0.0, 0.0)
    loss = training_losses(model.train(), batch, terms).total(terms)
    loss.backward()
    for kind in ("grad", "step"):
        if kind == "step":
            Adam(adapter_parameters(model), betas=(0.9, 0.95), weight_decay=0.01).step(LR)
        else:
            values = {name: p.data for name, p in adapter_parameters(model)}
            for _, p in adapter_parameters(model):
                p.data = p.grad if p.grad is not None else torch.zeros_like(p)
        for name, a, b in peft_export.pairs(model):
            stem = f"{kind}.base_model.model.{name}"
            found |= {f"{stem}.lora_A.weight": a.clone(), f"{stem}.lora_B.weight": b.clone()}
        for name, lengths in peft_export.row_lengths(model):
            found[f"{kind}.base_model.model.{name}.lora_magnitude_vector.weight"] = lengths.clone()
        if kind == "grad":
            for name, p in adapter_parameters(model):
                p.data = values[name]
    return found | {"loss": loss.detach()[None]}


def agree(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


CASES = {
    "mla": ("mla", LoRA(rank=3, alpha=5.0, base="fp32")),
    "lite": ("lite", LoRA(rank=4, rs=True, base="fp32")),
    "gqa": ("gqa", LoRA(rank=3, alpha=5.0, base="fp32")),
    "attention alone": ("mla", LoRA(rank=3, alpha=5.0, base="fp32", targets=("attention",))),
    "experts alone": ("mla", LoRA(rank=3, alpha=5.0, base="fp32", targets=("experts",))),
    "dora": ("gqa", LoRA(rank=3, alpha=5.0, base="fp32", dora=True)),
    "dora of attention": ("mla", LoRA(rank=4, rs=True, base="fp32", dora=True, targets=("attention",))),
    "transposed experts": ("oss", LoRA(rank=3, alpha=5.0, base="fp32")),
    "v4": ("v4", LoRA(rank=3, alpha=5.0, base="fp32")),
    "v4 by names": ("v4", LoRA(rank=3, alpha=5.0, base="fp32", targets=("o_a_proj", "q_b_proj", "kv_proj", "experts"))),
    "some": ("gqa", LoRA(rank=3, alpha=5.0, base="fp32", targets=("q_proj", "v_proj", "up_proj"))),
}


def test_adapters_made_here_compute_learn_and_step_the_same_in_peft(tmp_path: Path) -> None:
    cases, ours = [], []
    for name, (family, lora) in CASES.items():
        out = tmp_path / name
        out.mkdir()
        model = adapted(family, lora, std=STD)
        model.base = str(base(family, tmp_path / f"{family} base"))
        peft_export.save(out, model)
        cases.append({"base": model.base, "adapter": str(out), "out": str(out)})
        ours.append(answered(model))
    for (name, _), mine, theirs in zip(CASES.items(), ours, asked(cases), strict=True):
        print(name)
        agree(mine, theirs)


MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "q and v": ("gqa", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "all linear": ("gqa", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True}),
    "patterns": (
        "gqa",
        {
            "r": 4,
            "target_modules": ["k_proj", "v_proj"],
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"0.self_attn.v_proj": 3},
        },
    ),
    "dora": ("gqa", {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "v_proj", "up_proj"], "use_dora": True}),
    "fused experts": ("mla", {"r": 3, "lora_alpha": 5, "target_modules": ATTENTION, "target_parameters": FUSED}),
    "gate_up alone": ("mla", {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": FUSED[:1]}),
    "down alone": ("mla", {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": FUSED[1:]}),
    "transposed experts": ("oss", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": FUSED}),
    # peft turns these into fused experts of twice the rank
    "experts by old names": (
        "mla",
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_b_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
}


def test_adapters_made_by_peft_compute_and_learn_the_same_here(tmp_path: Path) -> None:
    cases = []
    for seed, (name, (family, settings)) in enumerate(MADE.items()):
        (tmp_path / name).mkdir()
        made = {"base": str(base(family, tmp_path / f"{family} base")), "make": settings, "seed": seed}
        cases.append(made | {"out": str(tmp_path / name)})
    for (name, (_, settings)), case, theirs in zip(MADE.items(), cases, asked(cases), strict=True):
        print(name)
        start = Path(f"{case['base']}+{case['out']}")
        alpha = float(settings.get("lora_alpha", 8))
        rs, dora = settings.get("use_rslora", False), settings.get("use_dora", False)
        lora = LoRA(settings["r"], alpha, rs, dora=dora, base="fp32")
        model = models.load_for_training(start, lora, torch.float32, 0)
        assert isinstance(model, AdaptedTransformer)
        mine = answered(model)
        torch.testing.assert_close(mine["logits"], theirs["logits"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits(models.load(start).eval()), theirs["logits"], atol=2e-5, rtol=1e-5)
        if name in ("dora", "q and v", "all linear", "fused experts"):
            agree(mine, theirs)
