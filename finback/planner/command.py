"""`finback plan`: turns options into values and text. Imports torch only when a recipe or a calibration needs it."""

from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.model.config import V3
from finback.parallel import launch
from finback.planner import calibration_file, cluster, engines, hardware, picture, presets, published, render
from finback.planner.options import PlanOptions
from finback.runs import recipe as recipes
from finback.runs.recipe import Recipe


def run(options: PlanOptions, path: Path) -> tuple[dict[str, Any], str]:
    """Plans with the calibration at `path`; returns values for --json, and text."""
    if options.what.endswith(".py"):
        return recipe(recipes.load(Path(options.what), options.settings), options, path)
    if options.what:
        return preset(options)
    if options.calibrate:
        return calibrated(path)
    raise UserError("plan", "", "nothing to plan", "Give a recipe or a preset, or --calibrate.")


def preset(options: PlanOptions) -> tuple[dict[str, Any], str]:
    """Plans a preset on named hardware; returns values for --json, and text."""
    found, image = presets.find(options.what), options.picture
    if not options.on:
        raise UserError("--on", "", "a preset needs hardware", "Give for example --on h800:2048.")
    if image is not None:
        picture.check(image)
    tokens = presets.count(options.tokens, "--tokens") if options.tokens else found.tokens
    rows, length = options.rows or found.rows, options.length or found.length
    if length > found.model.max_position_embeddings:
        raise UserError(
            "--length", length, f"{found.name} reads at most {found.model.max_position_embeddings}", "Lower it."
        )
    site = hardware.site(options.on, options.assume)
    work = cluster.workload(rows, length, site, options)
    planned = cluster.plan(found.name, found.model, work, tokens, site, options, found.source)
    # DeepSeek's published numbers are shown next to the plan of its own layout
    is_v3s = found.model == V3 and published.is_v3s(planned.work.layout)
    claims = published.claims(dict(hardware.ASSUMPTIONS)) if is_v3s else []
    planned.values["published"] = [vars(claim) | {"off": claim.off} for claim in claims]
    text = render.plan_text(planned.values, claims)
    if image is not None:
        text += "\n\n" + _draw(found.name, planned, image)
    return planned.values, text


def _draw(name: str, planned: cluster.ClusterPlan, image: Path) -> str:
    layout = planned.work.layout
    if layout.pp == 1:
        raise UserError("--picture", str(image), "this layout has no pipeline", "Give one, for example --mesh pp=4.")
    title = f"{name}: {layout.pipeline.title}, {layout.pp} ranks, {layout.micro_batches} micro-batches"
    picture.draw(planned.step.timeline, title, image)
    planned.values["picture"] = str(image)
    return f"Picture: {image}"


def recipe(plan: Recipe, options: PlanOptions, path: Path) -> tuple[dict[str, Any], str]:
    """Plans a recipe stage by stage, on this machine unless hardware is named."""
    from finback.planner import recipe_plan

    known = None
    if not options.on and (options.calibration or path.is_file()):  # a given file must exist
        known = calibration_file.read(path)
    if options.picture is not None:
        picture.check(options.picture)
    values = recipe_plan.plan(plan, options, known, options.ranks or launch.default_ranks())
    text = render.recipe_text(values)
    if options.picture is not None:
        text += "\n\n" + _draw_engines(values, options.picture)
    return values, text


def _draw_engines(values: dict[str, Any], image: Path) -> str:
    drawn = next(iter(engines.of_plan(values["stages"])), None)
    if drawn is None:
        remedy = "Give --measured RUN or --on, and a recipe with RL in it."
        raise UserError("--picture", str(image), "the engines of this recipe are unknown", remedy)
    picture.draw_engines(drawn[1], f"{values['recipe']}, {drawn[0]}: engines and trainer", image)
    values["picture"] = str(image)
    return f"Picture: {image}"


def measure(rank: int, ranks: int, threads: int, path: Path) -> None:
    """Runs one rank of a calibration."""
    import torch

    from finback.parallel.mesh import World
    from finback.planner import calibrate

    torch.set_num_threads(threads)
    world = World.join(rank, ranks)
    calibrate.calibrate(world, path, print if rank == 0 else lambda _: None)
    world.leave()


def calibrated(path: Path) -> tuple[dict[str, Any], str]:
    """The results of a calibration."""
    found = calibration_file.read(path)
    errors = found["largest_error_of_fit"]
    lines = [
        f"{found['cpu']}, {found['ranks']} ranks, torch {found['torch']}: measured in {found['seconds']:.0f} s",
        *(f"  {n} products {max(v.values()) / 1e9:,.0f} GFLOP/s" for n, v in found["gemm_flops_per_second"].items()),
        f"  memory {found['memory_bytes_per_second'] / 1e9:,.1f} GB/s; a rank needs {found['process_bytes'] / 1e6:,.0f} MB without its model",
        f"  training steps are fitted within {max(errors.values()):.0%} (forward and backward in fp32: {errors['passes_fp32']:.0%})",
        *(f"  note: {text}" for text in calibration_file.doubts(found)),
        f"  stored in {path}",
    ]
    return found, "\n".join(lines)
