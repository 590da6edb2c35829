"""Draw docs/figures from benchmarks/results and from closed forms: a figure for each concept.

python scripts/figures.py [FOLDER]
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from finback.model.config import TINY, V3, V3_2, V4_FLASH, V4_PRO, ModelConfig
from finback.model.count import cache_bytes, token_flops
from finback.model.moe import Router, max_violation
from finback.parallel.schedules import SCHEDULES
from finback.planner.simulate import Durations, simulate

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
COLOURS = ("#3b6ea5", "#c8693a", "#4f9d69", "#8a5fa8", "#777777")
STYLE: Any = {
    "svg.hashsalt": "finback",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def result(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], form: str, colour: str = COLOURS[0]) -> None:
    """Horizontal bars, the first on top, with their values."""
    drawn = axes.barh(range(len(names)), values, color=colour)
    axes.bar_label(drawn, [form.format(value) for value in values], padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.18)


def mla(axes: Axes) -> None:
    """Kilobytes that a token leaves in the cache of V3's 61 layers, by form of attention, bf16."""
    heads, layers = V3.num_attention_heads, V3.num_hidden_layers
    each = 2 * layers / 1000  # bytes of a number, in kB over all layers
    forms = {
        "MHA, 128 heads": heads * (V3.qk_head_dim + V3.v_head_dim) * each,
        "GQA, 8 keys of 128": 2 * 8 * 128 * each,
        "MQA, 1 key of 128": 2 * 128 * each,
        "MLA (V3)": cache_bytes(V3) / 1000,
    }
    bars(axes, list(forms), list(forms.values()), "{:,.0f} kB")
    axes.set_xlabel("cache per token, kB in bf16, 61 layers (log)")
    axes.set_xscale("log")


def moe(axes: Axes) -> None:
    """The fullest expert's load over the mean, less 1, of a router that prefers some experts, by the speed of its bias."""
    for speed, colour in zip((0.0, 0.001, 0.003), COLOURS, strict=False):
        draws = torch.Generator().manual_seed(0)
        router = Router(TINY)
        with torch.no_grad():
            router.weight.normal_(0.0, TINY.hidden_size**-0.5, generator=draws)
        common = torch.randn(
            TINY.hidden_size, generator=draws
        )  # what all tokens have in common makes some experts favourites
        violations = []
        for _ in range(300):
            index, _, _ = router(torch.randn(4096, TINY.hidden_size, generator=draws) + 0.5 * common)
            router.count(index, None)
            violations.append(max_violation(router.load))
            router.update_bias(speed)
            router.load.zero_()
        axes.plot(violations, color=colour, label=f"bias_speed = {speed}")
    axes.set_xlabel("step of 4,096 tokens")
    axes.set_ylabel("fullest over the mean, less 1")
    axes.legend(frameon=False)


def mtp(axes: Axes) -> None:
    """Bits per byte of held-out dialogues with and without the MTP loss, three seeds each."""
    runs = result("ablate-amd-epyc.json")["runs"]
    for i, optimizer in enumerate(("muon", "adamw")):
        for with_mtp in (True, False):
            found = [run["bits_per_byte"] for run in runs if run["optimizer"] == optimizer and run["mtp"] is with_mtp]
            place = i + (0.15 if with_mtp else -0.15)
            label = ("with MTP" if with_mtp else "without") if not i else None
            axes.plot([place] * len(found), found, "o", color=COLOURS[with_mtp], label=label)
    axes.set_xticks((0, 1), ("Muon", "AdamW"))
    axes.set_xlim(-0.6, 1.6)
    axes.set_ylabel("bits per byte, held out")
    axes.legend(frameon=False)


def fp8(axes: Axes) -> None:
    """Relative gap of the smoothed losses."""
    losses = result("fp8-10m-amd-epyc.json")["losses"]
    n = min(map(len, losses.values()))
    window = 100

    def smooth(values: list[float]) -> list[float]:
        return [statistics.fmean(values[i - window : i]) for i in range(window, n + 1)]

    exact, rounded = smooth(losses["bf16"][:n]), smooth(losses["fp8"][:n])
    gap = [100 * (b / a - 1) for a, b in zip(exact, rounded, strict=True)]
    axes.plot(range(window, n + 1), gap, color=COLOURS[0])
    axes.axhspan(-0.25, 0.25, color=COLOURS[2], alpha=0.12, label="DeepSeek's bound, 0.25 %")
    axes.set_xlabel("step")
    axes.set_ylabel("loss in FP8 over bf16, %")
    axes.legend(frameon=False)


def schedules(axes: Axes) -> None:
    """Share of a step in which the most idle of 8 ranks waits, 24 micro-batches, simulated from the tables of instructions."""
    shares = {}
    for schedule in SCHEDULES.values():
        unit = 0.5 if schedule.placement in ("loop", "fold") else 1.0  # two stages a rank are half as large
        line = simulate(schedule.table(8, 24), Durations(f=unit, b=2 * unit, w=unit))
        shares[schedule.title] = 100 * line.bubble / line.makespan
    bars(axes, list(shares), list(shares.values()), "{:.1f} %")
    axes.set_xlabel("share of a step in which a rank waits, 8 ranks, 24 micro-batches")


def grpo(axes: Axes) -> None:
    """Share of right answers of ten seeds before and after 200 steps of RL, and of the control."""
    seeds = result("seeds.json")["seeds"]
    for seed in seeds:
        before, after = (100 * seed[when]["sampled"]["accuracy"] for when in ("before", "after"))
        axes.plot((0, 1), (before, after), "o-", color=COLOURS[0], alpha=0.7)
        if seed["control"]:
            control = 100 * seed["control"]["sampled"]["accuracy"]
            axes.plot((0, 1), (before, control), "o--", color=COLOURS[1], label="control: another answer's reward")
    axes.set_xticks((0, 1), ("base", "after R1-Zero"))
    axes.set_xlim(-0.3, 1.3)
    axes.set_ylabel("right answers, %, 600 held-out sums")
    axes.legend(frameon=False, loc="lower left")


def r1(axes: Axes) -> None:
    """Accuracy and language of every model of R1's recipe, first seed."""
    models = result("road.json")["seeds"][0]["models"]
    names = [name for name in ("base", "zero", "dev1", "dev2", "dev3", "r1") if name in models]
    sums = [100 * models[name]["sums"]["accuracy"] for name in names]
    english = [100 * (models[name]["sums"].get("language") or 0) for name in names]
    talk = [100 * models[name]["talk"]["accuracy"] for name in names]
    for values, label, colour in ((sums, "sums right", 0), (english, "chain in English", 1), (talk, "small talk", 2)):
        axes.plot(names, values, "o-", color=COLOURS[colour], label=label)
    axes.set_ylabel("%")
    axes.set_ylim(0, 105)
    axes.legend(frameon=False)


def distillation(axes: Axes) -> None:
    """The student's accuracy by training method, mean of all seeds."""
    seeds = result("road.json")["seeds"]
    names = {"student-base": "base", "student-gold": "bare answers", "student-rl": "RL alone", "distilled": "distilled"}
    means = [statistics.fmean(100 * seed["models"][name]["sums"]["accuracy"] for seed in seeds) for name in names]
    bars(axes, list(names.values()), means, "{:.0f} %", COLOURS[2])
    axes.set_xlabel(f"sums right, %, mean of {len(seeds)} seeds")


def dsa(axes: Axes) -> None:
    """Forward FLOPs of a token, dense and sparse, by length of the row."""
    _by_length(axes, {"V3 (dense)": V3, "V3.2 (sparse)": V3_2})


def v4(axes: Axes) -> None:
    """The same with V4's models."""
    _by_length(axes, {"V3 (dense)": V3, "V3.2": V3_2, "V4-Pro": V4_PRO, "V4-Flash": V4_FLASH})


def _by_length(axes: Axes, models: dict[str, ModelConfig]) -> None:
    lengths = [2**i for i in range(11, 21)]
    for (name, config), colour in zip(models.items(), COLOURS, strict=False):
        axes.plot(lengths, [token_flops(config, n / 2).total / 1e9 for n in lengths], "o-", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths[::3], [f"{n // 1024}K" for n in lengths[::3]])
    axes.set_xlabel("tokens of the row")
    axes.set_ylabel("GFLOPs of a token, forward")
    axes.legend(frameon=False)


FIGURES = (mla, moe, mtp, fp8, schedules, grpo, r1, distillation, dsa, v4)


def write(folder: Path) -> None:
    """One file for each figure; the same bytes for the same numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for draw in FIGURES:
            figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
            draw(axes)
            figure.savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/figures")
