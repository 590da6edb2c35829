"""A plan as text. Every number is also in the JSON, with its source. Does not import torch."""

from collections.abc import Sequence
from typing import Any

from finback.planner.published import Claim
from finback.runs.terminal import table

UNITS = {
    "memory": "B",
    "memory_bandwidth": "B/s",
    "link": "B/s",
    "network": "B/s",
    "bf16": "FLOP/s",
    "fp8": "FLOP/s",
    "fp32": "FLOP/s",
    "watts": "W",
}
PARTS = {
    "at_peak": "model FLOPs at peak",
    "mtp": "MTP at peak",
    "recompute": "recomputation at peak",
    "below_peak": "kernels below peak",
    "exposed": "exposed all-to-all",
    "bubble": "pipeline bubble",
    "exchange": "gradients and weights",
}

SENT = {
    "dispatch_network": "all-to-all between nodes",
    "dispatch_link": "within nodes",
    "context": "heads and tokens around attention",
    "pipeline": "to the next stage",
    "exchange": "gradients and weights",
}


def big(value: float | None, unit: str = "") -> str:
    """1.48e13 -> 14.8 T; larger numbers as 3.86e+24."""
    if value is None:
        return "unknown"
    if abs(value) >= 1e15:
        return f"{value:.4g} {unit}".strip()
    for size, letter in ((1e12, "T"), (1e9, "B" if not unit else "G"), (1e6, "M"), (1e3, "k" if unit else "K")):
        if abs(value) >= size:
            return f"{value / size:,.4g} {letter}{unit}"
    return f"{value:,.4g} {unit}".strip()


def span(seconds: float) -> str:
    """Seconds in a readable unit."""
    for size, word in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {word}"
    return f"{seconds:,.3g} s"


def plan_text(values: dict[str, Any], claims: Sequence[Claim] = ()) -> str:
    """The whole plan of one model on named hardware."""
    sections = [part(values) for part in (_model, _layout, _memory, _time, _schedules, _run, _basis)]
    if claims:
        sections.append(["Comparison with published figures (the JSON has the rule for ours):", _claims(claims)])
    return "\n\n".join("\n".join(section) for section in sections if section)


def _model(v: dict[str, Any]) -> list[str]:
    m, total = v["model"], sum(v["model"]["forward_products_with_mtp"].values())
    terms = {"attention": 0.0, "experts": 0.0, "dense": 0.0, "head": 0.0}
    for name, flops in m["forward_products_with_mtp"].items():
        group = "attention" if name.startswith("attention") else name
        group = {"shared": "experts", "router": "experts", "join": "dense"}.get(group, group)
        terms[group] += flops / total
    shares = ", ".join(f"{name} {share:.0%}" for name, share in terms.items() if share)
    more = {"with router biases": m["parameters_with_router_biases"], "with MTP": m["parameters_with_mtp"]}
    also = ", ".join(f"{count:,} {word}" for word, count in more.items() if count != m["parameters"])
    return [
        f"{m['name']}: {m['parameters']:,} parameters{f' ({also})' if also else ''},",
        f"  {m['active']:,} active per token; {m['training_flops_per_token'] / 1e9:,.1f} GFLOPs to train on a token "
        f"({m['training_flops_per_token_with_mtp'] / 1e9:,.1f} with MTP: {shares}); {m['cache_bytes_per_token']:,} bytes of cache",
    ]


def _layout(v: dict[str, Any]) -> list[str]:
    layout, b = v["layout"], v["batch"]
    how = "as given" if layout["given"] else "recommended"
    lines = [
        f"Layout ({how}) on {v['machine']['devices']:,} x {v['machine']['name']}: --mesh {layout['mesh']}"
        f" --schedule {layout['schedule']} --recompute {layout['recompute']}",
        f"  {layout['precision']}, {layout['optimizer']}; {b['rows']:,} rows of {b['length']:,} tokens a step, "
        f"{layout['micro_batches']:,} micro-batches of {layout['micro_rows']} per pipeline; no tensor parallelism",
    ]
    if routing := v["step"]["routing"]:
        lines.append(
            f"  a token's experts are on {routing['nodes']:.2f} nodes, {routing['remote_nodes']:.2f} of them remote"
            + (f"; the fullest expert rank has {routing['max_over_mean']:.2f} x the mean" if v["skew"] else "")
        )
    return lines


def _memory(v: dict[str, Any]) -> list[str]:
    m = v["memory"]
    names = ("weights", "gradients", "optimizer", "activations", "working", "reserve", "total")
    shown = sorted({0, m["worst_rank"], len(m["ranks"]) - 1})
    rows = [[str(r), *(f"{m['ranks'][r][name] / 1e9:.1f}" for name in names)] for r in shown]
    verdict = "fits" if m["fits"] else "DOES NOT FIT"
    return [
        f"Memory in GB of {m['device_bytes'] / 1e9:.0f}: {verdict} ({m['free_share']:.1%} free, {m['margin']:.0%} wanted)",
        table(rows, ("pipeline rank", *names), indent=2),
    ]


def _time(v: dict[str, Any]) -> list[str]:
    s, shares, sent = v["step"], v["step"]["shares"], v["step"]["traffic"]
    shown = {name: text for name, text in PARTS.items() if shares[name] > 5e-4}
    rows = [[text, f"{shares[name] * s['seconds']:.4g} s", f"{shares[name]:.1%}"] for name, text in shown.items()]
    lines = [
        f"Step: {s['seconds']:.4g} s, MFU {s['mfu']:.1%} ({s['efficiency']:.1%} while computing)",
        table(rows, indent=2),
    ]
    if amounts := [f"{word} {big(sent[part], 'B')}" for part, word in SENT.items() if sent[part]]:
        lines.append(f"  each device sends per step: {', '.join(amounts)}")
    return lines


def _schedules(v: dict[str, Any]) -> list[str]:
    if not v["schedules"]:
        return []
    rows = []
    for name, s in v["schedules"].items():
        if "refused" in s:
            rows.append([name, "refused", *[""] * 5])
            continue
        time = [f"{s['step_seconds']:.2f} s", f"{s['bubble_share']:.1%}"]
        memory = [f"{s['parameters']} x", f"{s['in_flight']:.1f}", f"{s['memory_bytes'] / 1e9:.1f} GB"]
        rows.append([name, *time, *memory, "yes" if s["fits"] else "no"])
    heads = ("schedule", "step", "bubble", "weights", "in flight", "memory", "fits")
    return [
        "The same mesh under each schedule (bubbles include the imbalance of stages):",
        table(rows, heads, indent=2),
    ]


def _run(v: dict[str, Any]) -> list[str]:
    r, serving = v["run"], v["serving"]
    dollars = "no price known, give --price"
    if r["dollars"] is not None:
        dollars = f"${r['dollars']:,.0f} at ${r['price']:g} an hour"
    energy = "" if r["kwh"] is None else f"; {big(r['kwh'] * 1e3, 'Wh')}, {r['co2_kg'] / 1e3:,.4g} t CO2e"
    lines = [
        f"Run of {big(r['tokens'])} tokens: {r['steps']:,.0f} steps, {span(r['seconds'])}, "
        f"{r['device_hours']:,.0f} device-hours, {dollars}{energy}"
    ]
    if serving["fits"]:
        lines.append(
            f"Serving on the same devices: {serving['weights'] / 1e9:.1f} GB of weights each, "
            f"room for {serving['tokens']:,.0f} tokens of cache each"
        )
    return lines


def _basis(v: dict[str, Any]) -> list[str]:
    facts = v["machine"]["facts"]
    used = {"memory", "bf16", "link", "network", "watts", "price", *(["mfu"] if v.get("rough") else [])}
    rows = [f"  {k} {big(f['value'], UNITS.get(k, ''))}: {f['source']}" for k, f in facts.items() if k in used]
    rows += [f"  {k} {f['value']:.4g}: {f['source']}" for k, f in v["assumptions"].items()]
    rows += [f"  note: {text}" for text in v["remarks"]]
    return ["Where the numbers are from (change one with --assume NAME=VALUE):", *rows]


def _claims(claims: Sequence[Claim]) -> str:
    rows = []
    for c in claims:
        places = 1 if c.published < 1000 else 0
        rows.append([c.what, f"{c.published:,.{places}f}", f"{c.ours:,.{places}f}", f"{c.off:+.2%}"])
    return table(rows, ("", "published", "here", "off"), indent=2)


def recipe_text(values: dict[str, Any]) -> str:
    """A recipe's plan as a table."""
    rows = [_stage(name, stage) for name, stage in [*values["stages"].items(), ("all", values["total"])]]
    heads = ["stage", "kind", "trains", "generates", "FLOPs", "time", "memory", "$", "energy", ""]
    lines = [f"{values['recipe']} on {values['on']}; tokens are the most a stage can take", table(rows, heads, 2)]
    if basis := values["basis"]:
        per_hour = f"${basis['dollars_per_core_hour']:g} per core-hour and {basis['watts_per_core']:g} W per core"
        lines.append(f"Cost and energy are estimates, at {per_hour}.")
    lines += [f"note: {text}" for text in values["notes"]]
    if "machine" in values:
        lines += ["", *_basis(values | {"remarks": []})]
    return "\n".join(lines)


def _stage(name: str, s: dict[str, Any]) -> list[str]:
    dollars = s.get("dollars")
    memory = f"{s['memory_bytes'] / 1e9:,.2f} GB" if "memory_bytes" in s else "-" if "stage" in s else ""
    return [
        name,
        s.get("stage", ""),
        *(big(s[key]) if key in s else "" for key in ("tokens_trained", "tokens_generated")),
        big(s["flops"]) if s.get("flops") else "-",
        span(s["seconds"]) if s.get("seconds") else "-",
        memory + ("" if s.get("fits", True) else " TOO MUCH"),
        "-" if dollars is None else f"{dollars:,.4f}" if dollars < 1 else f"{dollars:,.0f}",
        big(s["kwh"] * 1000, "Wh") if s.get("kwh") else "-",
        _how(s) if "stage" in s else "",
    ]


def _how(s: dict[str, Any]) -> str:
    if "refused" in s:
        return "rough, no layout for it on this mesh"
    if "step_seconds" in s:
        return f"{s['compute']}, {s['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in s:
        return f"{s['layout']}, MFU {s['mfu']:.1%}"
    unknown = "" if s.get("flops") or "parameters" not in s else "unknown until its data exist"
    return ", ".join(filter(None, (s.get("layout"), s.get("how", unknown))))
