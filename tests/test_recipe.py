"""Recipes and run folders: mistakes are refused before anything starts, and no work is repeated or mixed up."""

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import finback
from finback import cli
from finback.config import UserError, as_json
from finback.model.rope_scaling import LinearRope, Yarn
from finback.parallel.mesh import World
from finback.runs import knobs, reader
from finback.runs.files import read_json, read_lines, write_json, write_lines
from finback.runs.folder import Interrupted, StageRun, prepare_folder
from finback.runs.ledger import cost, spent
from finback.runs.reader import finished_stages
from finback.runs.recipe import Recipe, Stage, claim, execute, load, overridden, write_summary
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.prepare import TaskText
from finback.stages.pretrain import Probe
from finback.tasks.math import Chains
from finback.tasks.rewards import Reward

TINY_RECIPE = Path(finback.__path__[0]).parent / "recipes" / "tiny.py"


@dataclass(frozen=True, kw_only=True)
class Note(Stage):
    """Logs `steps` lines, and appends its name to <root>/calls on each run."""

    start: str = ""
    steps: int = 2
    words: tuple[str, ...] = ("a",)
    stop: bool = False

    def inputs(self) -> tuple[str, ...]:
        return (self.start,) if self.start else ()

    def run(self, run: StageRun) -> dict[str, Any]:
        with (run.root / "calls").open("a") as handle:
            handle.write(self.name)
        run.rewind(1)
        for step in range(1, self.steps + 1):
            run.log(step, loss=1 / step)
        run.account(tokens_trained=100)
        if self.stop:
            raise Interrupted
        return {"steps": self.steps}


def recipe(*stages: Stage) -> Recipe:
    return Recipe("notes", stages)


def run_all(plan: Recipe, root: Path, seed: int = 0) -> None:
    """Runs what `finback run` runs in one process."""
    prepare_folder(root)
    claim(plan, root, seed)
    execute(plan, root, seed, World(), watch=lambda run: None, quiet=True)


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(text: str) -> Any:
    """pytest.raises for a UserError with exactly this text."""
    return pytest.raises(UserError, match=f"^{re.escape(text)}$")


def test_the_quickstart_loads() -> None:
    plan = load(TINY_RECIPE)
    assert plan.name == "tiny" and [s.name for s in plan.stages] == ["prepare", "base", "before", "zero", "after"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "Pretrain(name='base', data='p', model=TINY, mixture={}, max_token=5)",
            "Pretrain.max_token = {line}: no such field. Did you mean 'max_tokens'?",
        ),
        (
            "Evaluate(name='exam', start='p', exams=(), source=())",
            "Evaluate.source = {line}: no such field. Did you mean 'sources'?",
        ),
        (
            "Exam(name='greedy', task=Chains(), problem=5)",
            "Exam.problem = {line}: no such field. Did you mean 'problems'?",
        ),
        ("Chains(min_term=3)", "Chains.min_term = {line}: no such field. Did you mean 'min_terms'?"),
        (
            "dataclasses.replace(TINY, hiden_size=64)",
            "ModelConfig.hiden_size = {line}: no such field. Did you mean 'hidden_size'?",
        ),
    ],
)
def test_an_unknown_field_is_named_with_its_line_and_its_neighbour(line: str, message: str, tmp_path: Path) -> None:
    imports = (
        "import dataclasses\n"
        "from finback.model.config import TINY\n"
        "from finback.stages.evaluate import Evaluate, Exam\n"
        "from finback.stages.pretrain import Pretrain\n"
        "from finback.tasks.math import Chains\n"
    )
    path = written(tmp_path, f"{imports}\nrecipe = [\n    {line},\n]\n")
    with refusal(message.format(line=repr(f"{path}, line 8"))):
        load(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            "name='prepare', vocab_size='1024'",
            "prepare.vocab_size = '1024': expected int, got str. Correct the value in the recipe.",
        ),
        (
            "name='prepare', text=[]",
            "prepare.text = []: expected tuple[finback.data.sources.Chitchat | finback.data.sources.Files | finback.data.sources.Hub | finback.data.package_sources.PackageSource, ...], got list. Correct the value in the recipe.",
        ),
        ("name='prepare'", "prepare.text = []: needs at least one source, with distinct names. Name them."),
        (
            "name='Prepare me', text=(Chitchat(),)",
            "name = 'Prepare me': not a folder name. Use lower-case letters, digits, - and _.",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(fields: str, message: str, tmp_path: Path) -> None:
    lines = "from finback.data.sources import Chitchat\nfrom finback.stages.prepare import Prepare\n"
    with refusal(message):
        load(written(tmp_path, f"{lines}recipe = [Prepare({fields})]\n"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = 1\nrecipe = [\n", ", line 2': SyntaxError: '[' was never closed (mine.py, line 2)"),
        ("\n\nrecipe = [1 / 0]\n", ", line 3': ZeroDivisionError: division by zero"),
        ("\nimport finback.stage\n", ", line 2': ModuleNotFoundError: No module named 'finback.stage'"),
        ("def make():\n    return [steps]\nrecipe = make()\n", ", line 2': NameError: name 'steps' is not defined"),
        ("\n\nimport json\njson.loads('[')\n", ", line 4': JSONDecodeError: "),
        ("import sys\nsys.exit(2)\n", ", line 2': SystemExit: 2"),
    ],
)
def test_a_recipe_that_fails_names_its_line(text: str, problem: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=rf"^recipe = '{re.escape(f'{path}{problem}')}.*\. Correct the recipe"):
        load(path)


@pytest.mark.parametrize("text", ["", "recipe = ()", "recipe = None", "recipe = ['prepare']", "recipes = []"])
def test_a_recipe_is_a_list_of_stages(text: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with refusal(f"recipe = '{path}': does not define `recipe`, a list of stages. See recipes/tiny.py."):
        load(path)


def test_an_empty_recipe_is_refused(tmp_path: Path) -> None:
    with refusal("recipe = 'mine': has no stages. Add at least one stage."):
        load(written(tmp_path, "recipe = []"))


def test_a_missing_recipe_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "recipe = []")
    monkeypatch.chdir(tmp_path)  # a folder without recipes
    with refusal(f"recipe = '{tmp_path / 'mime.py'}': no such file. Did you mean '{tmp_path / 'mine.py'}'?"):
        load(tmp_path / "mime.py")
    with refusal(
        f"recipe = '{tmp_path / 'no' / 'mine.py'}': no such file. There is no recipe in that folder, or in recipes/ of this one; finback's own are in its repository."
    ):
        load(tmp_path / "no" / "mine.py")


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (
            {"a": "b", "b": ""},
            "a input = 'b': comes later in the recipe. A stage can only read earlier ones; reorder them.",
        ),
        ({"a": "", "b": "b"}, "b input = 'b': is the stage itself. A stage can only read earlier ones; reorder them."),
        (
            {"base": "", "b": "bass"},
            "b input = 'bass': neither an earlier stage, the folder of a finished one nor a checkpoint. Did you mean 'base'?",
        ),
        (
            {"base": "", "b": "zzz"},
            "b input = 'zzz': neither an earlier stage, the folder of a finished one nor a checkpoint. Known: base.",
        ),
        (
            {"a": "base"},
            "a input = 'base': neither an earlier stage, the folder of a finished one nor a checkpoint. It is the first stage.",
        ),
    ],
)
def test_a_stage_reads_only_earlier_ones(starts: dict[str, str], message: str) -> None:
    with refusal(message):
        recipe(*(Note(name=name, start=start) for name, start in starts.items()))


def test_a_stage_may_read_a_finished_stage_elsewhere(tmp_path: Path) -> None:
    run_all(recipe(Note(name="a")), tmp_path)
    run_all(recipe(Note(name="b", start=str(tmp_path / "a"))), tmp_path / "other")
    assert (tmp_path / "other" / "calls").read_text() == "b"


def test_two_stages_of_one_name_are_refused() -> None:
    with refusal("name = 'a': two stages have the same name. Rename one of them."):
        recipe(Note(name="a"), Note(name="b"), Note(name="a"))


@pytest.mark.parametrize("name", ["", "Base", "a/b", "../a", ".a", "-a", "a b", "ä", "a\n", "a.b"])
def test_a_stage_name_must_be_a_folder_name(name: str) -> None:
    with refusal(f"name = {name!r}: not a folder name. Use lower-case letters, digits, - and _."):
        Note(name=name)


def test_settings_change_knobs() -> None:
    plan = recipe(Note(name="a"), Note(name="b", start="a"))
    changed = Recipe(plan.name, overridden(plan.stages, ["b.steps=2e1", "a.words=x,y", "b.stop=true", "b.steps=30"]))
    assert changed.stages == (Note(name="a", words=("x", "y")), Note(name="b", start="a", steps=30, stop=True))
    assert plan.stages[1] == Note(name="b", start="a")
    base = load(TINY_RECIPE, ["base.model.hidden_size=64", "zero.reward.form=0"]).stages
    assert base[1].model.hidden_size == 64 and base[3].reward.form == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("zero.steps", "--set = 'zero.steps': not of the form stage.field=value. Example: --set zero.steps=100"),
        ("steps=5", "--set = 'steps=5': not of the form stage.field=value. Example: --set zero.steps=100"),
        ("zero.=5", "--set = 'zero.=5': not of the form stage.field=value. Example: --set zero.steps=100"),
        (".steps=5", "--set = '.steps=5': not of the form stage.field=value. Example: --set zero.steps=100"),
        ("", "--set = '': not of the form stage.field=value. Example: --set zero.steps=100"),
        ("zeros.steps=5", "--set = 'zeros.steps=5': no stage 'zeros'. Did you mean 'zero'?"),
        ("x.steps=5", "--set = 'x.steps=5': no stage 'x'. Known: after, base, before, prepare, zero."),
        ("zero.step=5", "zero.step = '5': no such field. Did you mean 'steps'?"),
        ("zero.steps=five", "zero.steps = 'five': expected int. Write for example 100 or 2e6."),
        ("zero.steps=", "zero.steps = '': expected int. Write for example 100 or 2e6."),
        ("zero.reward.accurracy=1", "zero.reward.accurracy = '1': no such field. Did you mean 'accuracy'?"),
        ("base.compute=fp64", "base.compute = 'fp64': expected one of auto, fp32, bf16, fp8. Use one of them."),
        ("base.model.n_group=3", "model.n_group = 3: does not divide 8 experts. Use a divisor."),
        (
            "base.data=bass",
            "base input = 'bass': neither an earlier stage, the folder of a finished one nor a checkpoint. Known: prepare.",
        ),
        (
            "base.data=zero",
            "base input = 'zero': comes later in the recipe. A stage can only read earlier ones; reorder them.",
        ),
        ("before.name=zero", "name = 'zero': two stages have the same name. Rename one of them."),
        (
            "prepare.tasks=chains",
            "prepare.tasks = 'chains': a TaskText cannot be given on the command line. Edit the recipe file.",
        ),
    ],
)
def test_mistakes_in_settings_are_named(setting: str, message: str) -> None:
    with refusal(message):
        load(TINY_RECIPE, [setting])


MADE = """
from typing import Literal
from tests.test_recipe import Note

def recipe(size: Literal["large", "small"] = "large", steps: int = 7) -> list[Note]:
    return [Note(name="a", steps=steps if size == "large" else 1)]
"""


def test_a_recipe_may_have_knobs_of_its_own(tmp_path: Path) -> None:
    """Parameters of the function that makes the stages; settings of stages apply afterwards."""
    path = tmp_path / "made.py"
    path.write_text(MADE, encoding="utf-8")
    assert load(path).stages == (Note(name="a", steps=7),)
    assert load(path, ["size=small", "a.stop=true"]).stages == (Note(name="a", steps=1, stop=True),)
    assert load(path, ["steps=2e1"]).stages == (Note(name="a", steps=20),)
    for setting, message in (
        ("size=smal", "size = 'smal': expected one of large, small. Did you mean 'small'?"),
        ("steps=five", "steps = 'five': expected int. Write for example 100 or 2e6."),
        ("sizes=small", "--set = 'sizes=small': the recipe has no knob 'sizes'. Did you mean 'size'?"),
        ("size", "size = '': expected one of large, small. Use one of them."),
    ):
        with refusal(message):
            load(path, [setting])


@pytest.mark.parametrize(
    "setting",
    [
        "base.batch_size=0",
        "base.seq_len=0",
        "base.checkpoint_steps=0",
        "base.probe.every_tokens=0",
        "base.probe.problems=0",
        "zero.prompts_per_step=0",
        "zero.num_generations=0",
        "zero.checkpoint_steps=0",
        "zero.max_tokens=0",
    ],
)
def test_numbers_that_no_run_survives_are_refused_before_it_starts(setting: str) -> None:
    """Each of these would divide by zero or have nothing to do, some of them minutes into the run."""
    with pytest.raises(UserError, match=rf"^\S*{setting.split('=')[0].split('.')[-1]} = 0: .+\. .+\.$"):
        load(TINY_RECIPE, [setting])


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        (Probe, "at_least", "0.7"),
        (Exam, "problems", "600"),
        (TaskText, "documents", "2000"),
        (Reward, "form", "0.1"),
        (Yarn, "factor", "40"),
    ],
)
def test_parts_of_stages_check_their_types_too(part: type, field: str, value: str) -> None:
    given: dict[str, Any] = {"task": Chains(), "tasks": (Chains(),), "name": "x", "at_least": 0.5, "documents": 5}
    fields = {f.name: given[f.name] for f in dataclasses.fields(part) if f.name in given} | {field: value}
    with pytest.raises(UserError, match=rf"\S+\.{field} = '{value}': expected (int|float), got str\. Correct"):
        part(**fields)


@pytest.mark.parametrize("names", [(), ("greedy", "greedy"), ("a/b",)])
def test_exams_need_names_that_make_distinct_files(names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="exam"):
        Evaluate(name="after", start="zero", exams=tuple(Exam(name=name, task=Chains()) for name in names))


def test_finished_stages_are_not_run_again(tmp_path: Path) -> None:
    plan = recipe(Note(name="a"), Note(name="b", start="a"))
    run_all(plan, tmp_path)
    run_all(plan, tmp_path)
    assert (tmp_path / "calls").read_text() == "ab"
    run_all(recipe(*plan.stages, Note(name="c", start="b")), tmp_path)
    assert (tmp_path / "calls").read_text() == "abc"
    assert list(read_json(tmp_path / "summary.json")["stages"]) == ["a", "b", "c"]
    manifest = read_json(tmp_path / "b" / "manifest.json")
    assert manifest["results"] == {"steps": 2} and "config.json" in manifest["files"]
    assert not list(tmp_path.rglob("*.part"))


def test_a_copied_run_keeps_the_order_of_its_stages(tmp_path: Path) -> None:
    """Whatever modification times the copies have; what finished after summary.json was written is the newest."""
    for second, name in enumerate(("left", "zero", "after", "base")):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "manifest.json", {})
        os.utime(tmp_path / name / "manifest.json", (second, second))
    summary = tmp_path / "summary.json"
    assert [folder.name for folder in finished_stages(tmp_path)] == ["left", "zero", "after", "base"]
    write_json(summary, {"stages": {"base": {}, "zero": {}, "after": {}}})
    assert [folder.name for folder in finished_stages(tmp_path)] == ["left", "base", "zero", "after"]
    os.utime(summary, (0, 0))
    os.utime(tmp_path / "left" / "manifest.json", (9, 9))
    assert [folder.name for folder in finished_stages(tmp_path)] == ["base", "zero", "after", "left"]
    summary.write_text("[]")
    assert [folder.name for folder in finished_stages(tmp_path)] == ["zero", "after", "base", "left"]
    with pytest.raises(UserError, match="Delete that file and run the recipe again"):
        reader.summary(tmp_path)


def test_an_interrupted_stage_is_done_again_and_those_before_it_are_not(tmp_path: Path) -> None:
    plan = recipe(Note(name="a"), Note(name="b", stop=True), Note(name="c"))
    with pytest.raises(Interrupted):
        run_all(plan, tmp_path)
    assert not (tmp_path / "b" / "manifest.json").exists()
    with pytest.raises(Interrupted):
        run_all(plan, tmp_path)
    assert (tmp_path / "calls").read_text() == "abb"


def test_a_request_to_stop_waits_for_the_end_of_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it comes before the stage begins."""
    log = StageRun.log

    def press(run: StageRun, step: int, **metrics: Any) -> None:
        run.stop_requested = True
        log(run, step, **metrics)

    plan = recipe(Note(name="a"), Note(name="b"))
    monkeypatch.setattr(StageRun, "log", press)
    with pytest.raises(Interrupted):
        run_all(plan, tmp_path)
    assert (tmp_path / "a" / "manifest.json").is_file() and not (tmp_path / "b").exists()

    def press_early(run: StageRun) -> None:
        run.stop_requested = True

    with pytest.raises(Interrupted):
        execute(plan, tmp_path, 0, World(), press_early, quiet=True)
    assert (tmp_path / "calls").read_text() == "a" and not (tmp_path / "b" / "manifest.json").exists()


def test_a_folder_of_another_recipe_or_seed_is_refused(tmp_path: Path) -> None:
    stage = Note(name="a")
    run_all(recipe(stage), tmp_path)
    remedy = "Choose another folder with --runs, or delete this one."
    with refusal(f"runs = '{tmp_path}': belongs to recipe 'notes', this is 'others'. {remedy}"):
        claim(Recipe("others", (stage,)), tmp_path, 0)
    with refusal(f"runs = '{tmp_path}': belongs to seed 0, this is 1. {remedy}"):
        claim(recipe(stage), tmp_path, 1)
    (tmp_path / "recipe.json").unlink()
    written = f'write {{"recipe": "notes", "seed": 0}} into {tmp_path / "recipe.json"}'
    remedy = f"Choose another folder with --runs, or, if they are of this one, {written}."
    with refusal(f"runs = '{tmp_path}': holds stages of an unknown recipe. {remedy}"):
        claim(recipe(stage), tmp_path, 0)


def test_a_stage_made_with_other_knobs_is_refused(tmp_path: Path) -> None:
    a, b = Note(name="a"), Note(name="b", words=("x", "y"))
    run_all(recipe(a, b), tmp_path)
    for changes, message in [
        ({"steps": 3}, "b.steps = 3: {} was made with 2. "),
        ({"words": ("x",)}, "b.words = ['x']: {} was made with ['x', 'y']. "),
        ({"start": "a"}, "b.start = 'a': {} was made with ''. "),
    ]:
        remedy = "Choose another folder with --runs, or delete that stage's folder and those after it."
        with refusal(message.format(tmp_path / "b") + remedy):
            claim(recipe(a, dataclasses.replace(b, **changes)), tmp_path, 0)  # type: ignore[arg-type]
    claim(recipe(a, b, Note(name="c", steps=9)), tmp_path, 0)  # not begun, so its knobs may change
    old = read_json(tmp_path / "b" / "config.json")
    del old["stop"]  # made by a version without this knob
    write_json(tmp_path / "b" / "config.json", old)
    claim(recipe(a, b), tmp_path, 0)
    with refusal(f"b.stop = True: {tmp_path / 'b'} was made with False. {remedy}"):
        claim(recipe(a, dataclasses.replace(b, stop=True)), tmp_path, 0)


def test_knobs_within_a_knob_are_compared_one_by_one() -> None:
    """Fields that an earlier version did not have had their defaults, at any depth."""
    yarn = Yarn(factor=2.0)
    stored = json.loads(json.dumps(as_json({"scalings": (yarn, yarn)})))
    assert knobs.difference({"scalings": (yarn, yarn)}, stored, "a") is None
    del stored["scalings"][1]["beta_fast"]
    assert knobs.difference({"scalings": (yarn, yarn)}, stored, "a") is None
    found = knobs.difference({"scalings": (yarn, dataclasses.replace(yarn, beta_fast=9.0))}, stored, "a")
    assert found == ("a.scalings.1.beta_fast", 9.0, yarn.beta_fast)
    stored["scalings"][0]["gone"] = 3  # a field that this version no longer has
    assert knobs.difference({"scalings": (yarn, yarn)}, stored, "a") == ("a.scalings.0.gone", None, 3)
    one = {"scalings": (yarn,)}
    assert knobs.difference(one, stored, "a") == ("a.scalings", [as_json(yarn)], stored["scalings"])
    assert knobs.difference(yarn, as_json(LinearRope(factor=2.0)), "a") == ("a.type", "Yarn", "LinearRope")


def test_knobs_of_the_quickstart_survive_their_file(tmp_path: Path) -> None:
    plan = load(TINY_RECIPE)
    claim(plan, tmp_path, 0)
    for stage in plan.stages:
        (tmp_path / stage.name).mkdir()
        write_json(tmp_path / stage.name / "config.json", as_json(stage))
    claim(load(TINY_RECIPE), tmp_path, 0)


LEDGER = """\
{"seconds": 10, "cores": 2, "tokens_trained": 1000, "flops": 1e9, "peak_flops": 4e9}
{"seconds": 5, "cores": 4, "tokens_generated": 500}
{"seconds": 7, "cor"""


def test_costs_add_up_by_hand(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text(LEDGER)
    total = cost(tmp_path)
    assert total["wall_seconds"] == 15 and total["tokens_per_second"] == 1500 / 15
    assert total["tokens_trained"] == 1000 and total["tokens_generated"] == 500
    assert total["flops"] == 1e9 and total["mfu"] == 0.25
    # 10 · 2 + 5 · 4 = 40 core-seconds at 12 W and 4 cents an hour
    assert total["energy_wh"] == 0.133 and total["money_usd"] == 0.00044
    assert total["basis"].startswith("estimate: 12 W per busy core, $0.04 per core-hour")
    empty = cost(tmp_path / "nothing")
    assert empty["wall_seconds"] == empty["money_usd"] == empty["tokens_per_second"] == 0 and empty["mfu"] is None


def test_a_summary_holds_what_is_finished(tmp_path: Path) -> None:
    plan = recipe(Note(name="a"), Note(name="b"))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "ledger.jsonl").write_text(LEDGER)
    write_json(tmp_path / "a" / "manifest.json", {"stage": "a", "files": [], "results": {"x": 1}})
    write_summary(plan, tmp_path, seed=3)
    assert read_json(tmp_path / "summary.json") == {
        "recipe": "notes",
        "seed": 3,
        "stages": {"a": {"stage": "Note", "results": {"x": 1}, "text": "", "cost": cost(tmp_path / "a")}},
    }


STAGE = """
from dataclasses import dataclass
from finback.runs.recipe import Stage

@dataclass(frozen=True, kw_only=True)
class Nothing(Stage):
    def run(self, run):
        return {}

recipe = [Nothing(name="a"), Nothing(name="b")]
"""


@pytest.mark.parametrize("left", [None, ["a"]])
def test_a_run_killed_before_its_summary_was_written_gets_one(
    left: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last manifest is written before summary.json; a kill in between must lose nothing."""
    monkeypatch.delenv("RANK", raising=False)
    path = written(tmp_path, STAGE)
    root = tmp_path / "runs" / "mine"
    run_all(load(path), root)
    old = read_json(root / "summary.json")
    (root / "summary.json").unlink()
    if left is not None:
        write_json(root / "summary.json", old | {"stages": {name: old["stages"][name] for name in left}})
    cli.run(recipe=path, runs=tmp_path / "runs", settings=(), seed=0, ranks=1, as_json=True)
    assert list(json.loads(capsys.readouterr().out)["stages"]) == ["a", "b"]


def test_a_torn_line_of_metrics_is_forgotten(tmp_path: Path) -> None:
    run = StageRun(tmp_path, "a", 0, World(), quiet=True)
    run.folder.mkdir()
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert [r["step"] for r in read_lines(run.folder / "metrics.jsonl")] == [1, 2, 3]
    run.rewind(3)
    run.log(3, loss=0.5)
    assert read_lines(run.folder / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_what_is_spent_after_a_torn_line_of_the_ledger_counts(tmp_path: Path) -> None:
    run = StageRun(tmp_path, "a", 0, World(), quiet=True)
    run.folder.mkdir()
    (run.folder / "ledger.jsonl").write_text(LEDGER)
    run.account(tokens_trained=50)
    assert spent(run.folder)["tokens_trained"] == 1050


def test_a_line_ends_only_at_a_newline(tmp_path: Path) -> None:
    records = [{"answer": f"a{odd}b"} for odd in "\u2028\u2029\x85\x0b\x0c\x1c"]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]  # the format of saved exams
    (tmp_path / "exam.jsonl").write_text("".join(lines), encoding="utf-8")
    assert read_lines(tmp_path / "exam.jsonl") == records


@pytest.mark.parametrize("text", ['{"recipe": "no', "null", "[1]", '"text"'])
@pytest.mark.parametrize("name", ["recipe.json", "a/config.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "a").mkdir()
    write_json(tmp_path / "recipe.json", {"recipe": "notes", "seed": 0})
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"^run folder = '{tmp_path}/{name}': damaged \(.*\)\. Delete it and run"):
        claim(recipe(Note(name="a")), tmp_path, 0)


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with refusal(
        f"runs = '{tmp_path / 'file'}': cannot be written to (File exists). Choose another folder with --runs."
    ):
        prepare_folder(tmp_path / "file")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5 * 2**20}))
    with refusal(
        f"runs = '{tmp_path}': only 5 MB free, 200 MB needed. Free some space or choose another disk with --runs."
    ):
        prepare_folder(tmp_path)


def test_seeds_depend_on_the_purpose_and_on_nothing_else(tmp_path: Path) -> None:
    one, two = StageRun(tmp_path, "a", 7, World()), StageRun(tmp_path / "b", "b", 7, World(1, 2))
    assert one.seed("exam", "chains", 1) == two.seed("exam", "chains", 1)
    others = [
        one.seed("exam", "chains", 2),
        one.seed("exam"),
        StageRun(tmp_path, "a", 8, World()).seed("exam", "chains", 1),
    ]
    assert len({one.seed("exam", "chains", 1), *others}) == 4 and all(0 <= seed < 2**56 for seed in others)


def test_a_setting_may_name_a_start_that_the_file_does_not(tmp_path: Path) -> None:
    control = TINY_RECIPE.with_name("control.py")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="neither an earlier stage"):
        load(control, ["zero.start=nowhere"])
    assert load(control, [f"zero.start={tmp_path}"]).stages[0].start == str(tmp_path)  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class Saving(Note):
    """A stage that leaves a checkpoint and a part file, like every resumable stage."""

    checkpoint_steps: int = 5

    def run(self, run: StageRun) -> dict[str, Any]:
        for name in ("step-00000002.safetensors", "step-00000003.safetensors.part", "part-00000000.json"):
            (run.folder / name).touch()
        return super().run(run)


def test_what_resuming_needs_is_kept_until_the_stage_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(*_: object) -> None:
        raise OSError(28, "No space left on device")

    plan = recipe(Saving(name="a"))
    with monkeypatch.context() as broken:
        broken.setattr("finback.runs.folder.write_json", torn)
        with pytest.raises(OSError, match="No space left"):
            run_all(plan, tmp_path)
    scratch = {"step-00000002.safetensors", "step-00000003.safetensors.part", "part-00000000.json"}
    assert scratch <= {p.name for p in (tmp_path / "a").iterdir()}
    run_all(plan, tmp_path)
    left = {p.name for p in (tmp_path / "a").iterdir()}
    assert not scratch & left and "manifest.json" in left
    assert not scratch & set(read_json(tmp_path / "a" / "manifest.json")["files"])
    (tmp_path / "a" / "step-00000002.safetensors").touch()  # killed between the manifest and the clean-up
    run_all(plan, tmp_path)
    assert not list((tmp_path / "a").glob("step-*"))


def test_limits_of_the_running_may_change_in_a_half_finished_stage(tmp_path: Path) -> None:
    stage = Saving(name="a", stop=True)
    with pytest.raises(Interrupted):
        run_all(recipe(stage), tmp_path)
    claim(recipe(dataclasses.replace(stage, checkpoint_steps=1)), tmp_path, 0)
    with pytest.raises(UserError, match=r"a\.steps = 9"):
        claim(recipe(dataclasses.replace(stage, steps=9)), tmp_path, 0)


def test_half_a_surrogate_pair_survives_its_file(tmp_path: Path) -> None:
    """JSON from other programs may contain one, and UTF-8 cannot."""
    write_lines(tmp_path / "kept.jsonl", [{"question": "鯨 \ud83d?"}])
    assert read_lines(tmp_path / "kept.jsonl") == [{"question": "鯨 \ud83d?"}]
    assert "鯨" in (tmp_path / "kept.jsonl").read_text(encoding="utf-8")
