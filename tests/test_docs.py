"""Documents of a run: every fact comes from a record or an answer, the formats are valid, and files are complete."""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from finback import cli
from finback.config import UserError
from finback.parallel.mesh import World
from finback.planner.plan_vs_actual import plan_and_actual
from finback.report.docs import blocks as page
from finback.report.docs import build, completeness, compute, curves, facts
from finback.report.docs import questionnaire as asked
from finback.report.docs.facts import MISSING, NOT_PROVIDED
from finback.report.docs.questionnaire import QUESTIONS, Answers
from finback.report.summary import summarize
from finback.runs.declaration import DECLARATION
from finback.runs.files import read_json, read_lines, write_json, write_lines
from finback.runs.reader import StageFolder
from finback.runs.recipe import claim, execute, load, write_summary
from tests.toy import write_recipe

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
MORE = """
from finback.stages.distill import Distill
from finback.stages.sft import SFT
text = (TaskText(name="lessons", tasks=(chains,), documents=40),)
recipe[0] = Prepare(name="prepare", text=(Files((str(Path(__file__).parent / "words.txt"),), name="words", licence="MIT"),),
                    tasks=(TaskText(name="chains", tasks=(chains,), documents=300, think=0.5),), vocab_size=320)
recipe[2:2] = [SFT(name="taught", start="base", text=text, batch_size=4, seq_len=64, epochs=1)]
recipe[4] = GRPO(name="zero", start="taught", task=chains, steps=3, prompts_per_step=2, num_generations=4, max_tokens=8)
recipe.append(Distill(name="small", start="base", teacher="zero", text=text, batch_size=4, seq_len=64, epochs=1))
"""
SHORT = ("base.max_tokens=1024", "base.decay_tokens=512", "base.warmup_tokens=256", "base.compute=fp32")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few steps."""
    folder = tmp_path_factory.mktemp("docs")
    path = write_recipe(folder)
    path.write_text(path.read_text() + MORE)
    recipe, root = load(path, SHORT), folder / "runs" / "toy"
    root.mkdir(parents=True)
    claim(recipe, root, 0)
    execute(recipe, root, 0, World(), watch=lambda run: None, quiet=True)
    write_summary(recipe, root, 0)
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "toy"))


def filled(**changed: Any) -> Answers:
    """An answer to every question; keywords have __ for the dot of a key."""
    given: dict[str, Any] = {"text": "words of the provider", "list": ["en"], "yes or no": False, "number": 1e20}
    answers = {q.key: given[q.kind] for q in QUESTIONS if q.key != "model.use_limits"}
    answers |= {"base.licence": "MIT", "model.eu_date": "2026-02-01", "data.latest": "12/2025"}
    answers |= {"model.licence": "MIT", "model.released": "2026-02-01", "model.download": "https://example.org/m"}
    return Answers(answers | {k.replace("__", "."): v for k, v in changed.items()})


def texts(root: Path, answers: Answers, model: str = "zero") -> dict[str, str]:
    return build.documents(facts.read(root, model), answers, NOW)


def holes(run: facts.RunFacts, answers: Answers) -> int:
    """The number of NOT PROVIDED entries in the documents for people."""
    drafts = build.drafts(run, answers, "2026-03-01").values()
    return sum(page.markdown(blocks).count(NOT_PROVIDED) for blocks in drafts)


def test_a_run_that_was_told_everything_lacks_nothing(made: Path) -> None:
    found = texts(made, filled(model__use_limits="none"))
    # CycloneDX requires an energy supplier, which no question covers
    assert {name for name, text in found.items() if NOT_PROVIDED in text} == {"bom.cdx.json"}
    examined = build.examine(facts.read(made, "zero"), filled(), NOW)
    assert examined.holds and examined.as_text().endswith("Complete.")
    distilled = build.examine(facts.read(made), filled(), NOW)
    assert any("evaluation" in hole for hole in distilled.unrecorded), "the last model has no evaluation"


def test_a_question_without_an_answer_prints_not_provided(made: Path) -> None:
    run = facts.read(made, "zero")
    whole = holes(run, filled(model__use_limits="none"))
    for question in QUESTIONS:
        given = {k: v for k, v in filled(model__use_limits="none").given.items() if k != question.key}
        shown = holes(run, Answers(given))
        unused = question.key.startswith("base.") or question.key in (
            "provider.commercial",
            "model.monetised",
            "data.synthetic_public",
        )
        assert shown > whole or unused, question.key
        missed = build.examine(run, Answers(given), NOW).unanswered
        assert len(missed) == (question.needed), question.key


def entries(root: Path) -> Iterator[tuple[Path, tuple[Any, ...]]]:
    """Every entry of every manifest and every key of every ledger, as a file and the path within it."""
    yield root / "recipe.json", ("recipe",)
    yield root / "recipe.json", ("seed",)
    for path in sorted(root.glob("*/manifest.json")):
        value = read_json(path)
        yield from ((path, (key,)) for key in value)
        results = value["results"]
        yield from ((path, ("results", key)) for key in results)
        for name, record in results.get("sources", {}).items():
            yield from ((path, ("results", "sources", name, key)) for key in record if key != "files")
        for i, exam in enumerate(results.get("evaluations", ())):
            yield from ((path, ("results", "evaluations", i, key)) for key in exam)
    for path in sorted(root.glob("*/ledger.jsonl")):
        yield from ((path, (key,)) for key in {k: None for line in read_lines(path) for k in line})


def removed(path: Path, where: tuple[Any, ...]) -> None:
    values = read_lines(path) if path.suffix == ".jsonl" else [read_json(path)]
    for value in values:
        inner = value
        for step in where[:-1]:
            inner = inner[step]
        inner.pop(where[-1], None)
    write_lines(path, values) if path.suffix == ".jsonl" else write_json(path, values[0])


def test_each_entry_that_is_taken_away_is_seen_to_be_missing(run: Path) -> None:
    answers = filled(model__use_limits="none")
    models = {"small": "small"}  # another model's own stage appears in that model's documents
    whole = {model: holes(facts.read(run, model), answers) for model in ("zero", "small")}
    there = list(entries(run))
    for path, where in there:
        before, model = path.read_bytes(), models.get(path.parent.name, "zero")
        removed(path, where)
        assert holes(facts.read(run, model), answers) > whole[model], f"{path.parent.name}/{path.name}: {where}"
        path.write_bytes(before)
    assert len(there) > 120 and whole["zero"] == 0


def test_the_page_needs_nothing_else_and_has_the_curves(made: Path) -> None:
    found = texts(made, filled())
    html = found["report.html"]
    assert set(re.findall(r"https?://[^\"' <)]*", html)) <= {"http://www.w3.org/2000/svg", "https://example.org/m"}
    assert not re.search(r"<(script|link|img|iframe)|@import|url\(", html)
    assert "default-src 'none'" in html and "color-scheme: light dark" in html
    further = {"mtp loss": 1, "thinks": 3, "mismatch kl": 1}  # curves per figure beyond the first
    lines = html.count("<polyline") - sum(n * html.count(f"{name}</text>") for name, n in further.items())
    assert html.count("<svg") == lines
    for name in ("base: loss", "base: router health: max violation", "zero: tokens per answer", "taught: loss"):
        assert name in html
    for picture in re.findall(r"\]\((curves/[^)]*)\)", found["report.md"]):
        assert found[picture].startswith("<svg")


def test_what_a_model_or_a_provider_says_stays_text(run: Path) -> None:
    bad = "<script>alert(1)</script> | `x` [a](javascript:b) ```"
    path = run / "after" / "sampled.jsonl"
    write_lines(path, [r | {"answer": f"{bad}\n````\n# heading"} for r in read_lines(path)])
    found = texts(run, filled(provider__name=bad))
    assert "<script" not in found["report.html"] and "&lt;script&gt;" in found["report.html"]
    assert "`````text" in found["report.md"], "the fence must be longer than the answer's own"
    row = next(line for line in found["MODEL_CARD.md"].splitlines() if line.startswith("| provider"))
    assert r"\<script\>" in row and re.sub(r"\\.", "", row).count("|") == 3


def test_the_card_has_yaml_that_the_hub_reads(made: Path) -> None:
    from huggingface_hub import ModelCard

    card = texts(made, filled(model__languages=["en", "de"]))["MODEL_CARD.md"]
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit" and header["language"] == ["en", "de"] and header["metrics"] == ["accuracy"]
    data = ModelCard(card).data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.base_model is None, "it started from random weights"
    bare = yaml.safe_load(texts(made, Answers({}))["MODEL_CARD.md"].split("---")[1])
    assert "license" not in bare and "language" not in bare


def test_the_bill_of_materials_is_valid_cyclonedx(made: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_7)
    bare, text = (texts(made, answers)["bom.cdx.json"] for answers in (Answers({}), filled()))
    assert validator.validate_str(bare) is None and validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"machine-learning-model"', '"machine"')) is not None
    bom = json.loads(text)
    model = bom["metadata"]["component"]
    (metric, _) = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert set(metric["confidenceInterval"]) == {"lowerBound", "upperBound"}
    (words,) = [c for c in bom["components"] if c["name"] == "words"]
    sources = read_json(made / "prepare" / "sources.json")
    assert words["hashes"][0]["content"] == sources["words"]["sha256"]
    assert {"torch", "finback"} <= {c["name"] for c in bom["components"]}


@pytest.mark.parametrize("answers", [Answers({}), filled()])
def test_the_spdx_document_is_valid(made: Path, answers: Answers, tmp_path: Path) -> None:
    from spdx_python_model.bindings import v3_0_1 as spdx

    path = tmp_path / "model.json"
    path.write_text(texts(made, answers)["model.spdx3.json"])
    objects = spdx.SHACLObjectSet()
    with path.open("rb") as handle:
        spdx.JSONLDDeserializer().read(handle, objects)
    objects.link()
    with (tmp_path / "again.json").open("wb") as handle:  # the writer checks that every required entry is present
        spdx.JSONLDSerializer().write(objects, handle)
    (model,) = objects.foreach_type(spdx.ai_AIPackage)
    (document,) = objects.foreach_type(spdx.SpdxDocument)
    told = bool(answers.given)
    assert (model.suppliedBy is not None) == (model.releaseTime is not None) == told
    assert (model.comment is None) == told, "a comment names what the profile requires and no answer provides"
    profile = spdx.ProfileIdentifierType.ai
    assert (profile in list(document.profileConformance)) == told
    assert {d.name for d in objects.foreach_type(spdx.dataset_DatasetPackage)} == {"words", "chains", "lessons"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("answers", [Answers({}), filled()])
def test_croissant_reads_the_data_sets(made: Path, answers: Answers, tmp_path: Path) -> None:
    import mlcroissant

    found = {n: t for n, t in texts(made, answers).items() if n.startswith("croissant/")}
    assert set(found) == {"croissant/prepare-words.json", "croissant/prepare-chains.json"}
    for number, text in enumerate(found.values()):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        read = mlcroissant.Dataset(jsonld=str(path))
        assert not read.metadata.ctx.issues.errors and read.metadata.distribution


def test_curves_keep_spikes_and_have_round_ticks(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, {DECLARATION: {"curves": {"loss": ["loss", "mtp_loss"]}}})
    write_lines(stage.metrics_file, [{"step": i, "loss": 99.0 if i == 7_777 else 1.0} for i in range(10_000)])
    (drawn,) = curves.of_stage(stage)
    (points,) = re.findall(r'points="([^"]*)"', drawn.svg)
    assert len(points.split()) <= curves.POINTS and f",{curves.TOP:.1f} " in points
    assert curves.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert curves.ticks(0.13, 0.41) == pytest.approx([0.2, 0.3, 0.4])
    assert curves.ticks(3, 3) == [3]
    write_lines(stage.metrics_file, [{"step": 1, "loss": float("nan")}, {"step": None, "loss": 1}])
    assert curves.of_stage(stage) == []


def test_compute_is_counted_as_the_guidelines_say(run: Path) -> None:
    def ledger(stage: str, **flops: float) -> None:
        write_lines(run / stage / "ledger.jsonl", [{"seconds": 1, "cores": 1, **flops}])

    ledger("base", flops_training=8e22, flops_recomputed=5e22, flops_evaluation=9e24)
    ledger("taught", flops_training=1e22)
    ledger("zero", flops_training=2e22, flops_generation=9.9e24, flops_auxiliary=4e24)
    ledger("small", flops_training=7e30)  # another model's ledger entry
    found = facts.read(run, "zero")
    c = compute.of(found, Answers({}))
    assert c.training == pytest.approx(1.1e23) and c.cumulative == pytest.approx(1.001e25)
    general, systemic, third = (verdict for _, verdict in compute.verdicts(found, Answers({})))
    assert general.startswith("YES: 1.1e+23") and systemic.startswith("YES: 1e+25")
    assert third == "does not apply: the model began with random weights"
    public = compute.verdicts(found, Answers({"data.synthetic_public": True}))
    assert public[1][1].startswith("no: 1.1e+23"), "published answers are left out"
    teacher = compute.of(facts.read(run, "small"), Answers({}))
    assert teacher.generation == 0, "a teacher's own answers are not the student's"
    ledger("base", tokens_trained=5)
    assert compute.verdicts(facts.read(run, "zero"), Answers({}))[0][1] == "UNKNOWN: compute NOT PROVIDED"


@pytest.mark.parametrize(
    ("flop", "base", "verdict"),
    [
        (1e22, {"base.flop": 2e22}, "YES: 1e+22 FLOP are 0.5 of the original's"),
        (1e22, {"base.flop": 4e22}, "no: 1e+22 FLOP are 0.25 of the original's"),
        (4e22, {}, "YES: 4e+22 FLOP are 0.4 of 1e+23, since the original's is NOT PROVIDED"),
        (4e22, {"base.systemic": True}, "no: 4e+22 FLOP are 0.004 of 1e+25, since the original's is NOT PROVIDED"),
    ],
)
def test_a_modifier_is_measured_by_a_third(flop: float, base: dict[str, Any], verdict: str, run: Path) -> None:
    config = read_json(run / "base" / "config.json")
    write_json(run / "base" / "config.json", config | {"start": "models/another"})
    for stage, spent in (("base", flop), ("taught", 0), ("zero", 0)):
        write_lines(
            run / stage / "ledger.jsonl", [{"seconds": 1, "cores": 1, "flops_training": spent, "flops_generation": 0}]
        )
    found = facts.read(run, "zero")
    assert found.base == "models/another"
    assert compute.verdicts(found, Answers(base))[2][1] == verdict
    assert "base.name" in "".join(build.examine(found, filled(), NOW).unanswered) or "base.name" in filled().given


def test_licences_contradict_limits_money_and_sources(run: Path) -> None:
    found = facts.read(run, "zero")
    assert completeness.contradictions(found, filled()) == []
    limited = completeness.contradictions(found, filled(model__use_limits="no weapons", model__monetised=True))
    assert len(limited) == 2 and all("the exemption for open models is lost" in c for c in limited)
    for theirs, ours, why in (
        ("CC-BY-NC-4.0", "MIT", "forbids commercial use"),
        ("CC-BY-ND-4.0", "MIT", "forbids derivatives"),
        ("CC-BY-SA-4.0", "Apache-2.0", "asks for the same licence"),
        ("GPL-3.0-or-later", "MIT", "asks for the same licence"),
        ("CC-BY-NC-4.0", "CC-BY-NC-4.0", ""),
        ("GPL-3.0-only", "GPL-3.0-or-later", ""),
        ("CC-BY-4.0", "MIT", ""),
        ("MIT (generated here)", "MIT", ""),
    ):
        assert completeness.forbids(theirs, ours) == why
    path = run / "prepare" / "manifest.json"
    value = read_json(path)
    value["results"]["sources"]["words"]["licence"] = "CC-BY-NC-4.0"
    write_json(path, value)
    (said,) = completeness.contradictions(facts.read(run, "zero"), filled())
    assert said == "data set words is under CC-BY-NC-4.0, which forbids commercial use; the model is to be under MIT"
    value["results"]["sources"]["words"]["licence"] = "unstated"
    write_json(path, value)
    (unsaid,) = completeness.contradictions(facts.read(run, "zero"), filled())
    assert unsaid.startswith("data set words has no licence on record")


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("recipe.json", None, "not a run folder: it has no recipe.json"),
        ("recipe.json", "[", "damaged"),
        ("base/manifest.json", None, "not finished: base"),
        ("base/manifest.json", "{", "damaged"),
        ("base/manifest.json", "[]", "not an object"),
        ("base/manifest.json", '{"results": 3}', "its results are not an object"),
        ("base/config.json", "{}", "missing, or not the knobs of a stage"),
        ("zero/model.json", '{"vocab_size": 3}', "not the config of a model"),
    ],
)
def test_a_torn_or_foreign_folder_is_refused(file: str, text: str | None, problem: str, run: Path) -> None:
    (run / file).unlink() if text is None else (run / file).write_text(text)
    with pytest.raises(UserError, match=problem):
        facts.read(run, "zero")


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        ("summary.json", lambda found: {"recipe": "toy"}, "not a recipe's stages"),
        ("summary.json", lambda found: found | {"stages": {"base": None}}, "not a recipe's stages"),
        ("summary.json", lambda found: {"stages": {}}, "not a recipe's stages"),
        ("summary.json", lambda found: found | {"stages": {"base": {"cost": {}}}}, "has no cost of base"),
        ("base/config.json", lambda found: None, "not an object"),
        ("after/manifest.json", lambda found: found | {"results": {}}, "has no results of an evaluation"),
        ("after/manifest.json", lambda found: found | {"results": None}, "has no results of an evaluation"),
    ],
)
def test_a_damaged_record_is_named_by_the_summary_and_the_plan(file: str, change: Any, problem: str, run: Path) -> None:
    write_json(run / file, change(read_json(run / file)))
    with pytest.raises(UserError, match=f"{file}.*{problem}"):
        summarize(run)
    if file != "after/manifest.json" and "cost" not in problem:  # the plan reads ledgers, and no results
        with pytest.raises(UserError, match=f"{file}.*{problem}"):
            plan_and_actual(run, run / "no-calibration.json")


def test_a_folder_that_is_not_there_or_a_stage_without_a_model_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        facts.read(tmp_path / "no")
    with pytest.raises(UserError, match="no stage of this run made such a model"):
        facts.read(made, "before")


def test_stages_of_unknown_classes_have_the_same_documents(run: Path) -> None:
    for path in run.glob("*/config.json"):
        write_json(path, read_json(path) | {"type": "Mine"})
    assert build.examine(facts.read(run, "zero"), filled(), NOW).holds


def test_a_run_of_an_older_version_still_has_documents(run: Path) -> None:
    for path in run.glob("*/ledger.jsonl"):
        old = ("seconds", "cores", "tokens_trained", "tokens_generated", "flops", "peak_flops")
        write_lines(path, [{k: line[k] for k in old if k in line} for line in read_lines(path)])
    found = texts(run, filled())
    assert "UNKNOWN: compute NOT PROVIDED" in found["report.md"]
    assert "base: software" in build.examine(facts.read(run, "zero"), filled(), NOW).unrecorded


def test_documents_appear_when_all_are_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, out = facts.read(run, "zero"), tmp_path / "out"
    files = build.write(found, filled(), out, NOW)
    assert {p for p in out.rglob("*") if p.is_file()} == set(files)
    index = read_json(out / build.INDEX)
    assert all(facts.sha256(out / name) == digest for name, digest in index["files"].items())
    before = (out / "report.md").read_bytes()
    real, calls = Path.write_text, []

    def full(self: Path, *arguments: Any, **options: Any) -> int:
        calls.append(self)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        build.write(found, Answers({}), out, NOW)
    assert (out / "report.md").read_bytes() == before, "the older documents must be intact"
    assert [p.name for p in tmp_path.glob("out*")] == ["out"], "no temporary files may be left"
    monkeypatch.undo()
    build.write(found, Answers({}), out, NOW)
    assert NOT_PROVIDED in (out / "eu" / "copyright_policy.md").read_text()
    with pytest.raises(UserError, match="exists and has other contents"):
        build.write(found, filled(), run, NOW)


def test_the_same_records_give_the_same_documents(made: Path) -> None:
    assert texts(made, filled()) == texts(made, filled())


def test_the_template_is_an_answers_file_without_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.toml"
    path.write_text(asked.TEMPLATE)
    assert asked.read(path).given == {}
    commented = re.sub(r"^# (\w+ = )true or false$", r"\1true", asked.TEMPLATE, flags=re.M)
    commented = re.sub(r"^# (\w+ = )0.0$", r"\g<1>2.5", commented, flags=re.M)
    for name, value in (
        ("licence", "MIT"),
        ("released", "2026-02-01"),
        ("eu_date", "2026-02-01"),
        ("latest", "02/2026"),
    ):
        commented = commented.replace(f'\n{name} = ""', f'\n{name} = "{value}"')
    commented = commented.replace('\ndownload = ""', '\ndownload = "https://example.org"')
    path.write_text(re.sub(r'= ""$', '= "x"', commented.replace("[]", '["en"]'), flags=re.M))
    assert set(asked.read(path).given) == {q.key for q in QUESTIONS}, "every question has its line"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[provider]\nnam = 'x'", "provider.nam.*no such question.*Did you mean 'provider.name'"),
        ("name = 'x'", "no such question"),
        ("[model]\nlanguages = 'en'", "expected list"),
        ("[model]\nlanguages = [1]", "expected list"),
        ("[model]\nmonetised = 'no'", "expected yes or no"),
        ("[base]\nflop = true", "expected number"),
        ("[provider\n", "not TOML"),
    ],
)
def test_an_answers_file_that_does_not_fit_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        asked.read(path)


def test_toml_dates_are_dates(tmp_path: Path) -> None:
    path = tmp_path / "answers.toml"
    path.write_text("[model]\nreleased = 2026-02-01\n")
    assert asked.read(path)("model.released") == "2026-02-01"


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def docs(**options: Any) -> int:
        plain: dict[str, Any] = {
            "run": run,
            "out": None,
            "answers": None,
            "model": "zero",
            "check": False,
            "questions": False,
            "as_json": False,
        }
        try:
            cli.docs(**plain | options)
        except cli.typer.Exit as error:
            return int(error.exit_code)
        return 0

    assert docs(check=True) == 1 and capsys.readouterr().out.endswith("NOT COMPLETE.\n")
    assert docs(as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert str(run / "documents" / "report.html") in told["files"] and told["complete"] is False
    assert docs(questions=True) == 0 and capsys.readouterr().out == asked.TEMPLATE
    (tmp_path / "other.toml").write_text("[x]\ny = 1")
    with pytest.raises(UserError, match="no such question"):
        docs(answers=tmp_path / "other.toml")
    complete: dict[str, dict[str, Any]] = {}
    for key, value in filled().given.items():
        section, _, name = key.partition(".")
        complete.setdefault(section, {})[name] = value
    toml = "\n".join(
        f"[{section}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in table.items())
        for section, table in complete.items()
    )
    (run / "answers.toml").write_text(toml)
    assert docs(check=True) == 0 and capsys.readouterr().out.endswith("Complete.\n")
    with pytest.raises(UserError, match="nothing to document"):
        docs(run=None)


def test_values_are_said_as_people_read_them() -> None:
    shown = [page.display(v) for v in (MISSING, None, "", True, 12345, 0.123456, 2.0, 1.5e23, [1, "a"], {"a": None})]
    assert shown == [NOT_PROVIDED, "none", "none", "yes", "12,345", "0.1235", "2", "1.5e+23", "1, a", "a: none"]


CHROMIUM = os.environ.get("FINBACK_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 23, 28)")])
def test_the_page_opens_in_a_browser(scheme: Any, paper: str, made: Path, tmp_path: Path) -> None:
    from playwright import sync_api as playwright

    (tmp_path / "report.html").write_text(texts(made, filled())["report.html"])
    said: list[str] = []
    asked_for: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(color_scheme=scheme, viewport={"width": 390, "height": 844})
        opened.on("console", lambda message: said.append(message.text))
        opened.on("request", lambda request: asked_for.append(request.url))
        opened.goto(f"file://{tmp_path}/report.html")
        assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == paper
        assert opened.evaluate("document.documentElement.scrollWidth") <= 390, "no sideways scrolling on a phone"
        assert opened.locator("svg").count() == opened.locator("figure").count() > 5
        browser.close()
    assert said == [] and asked_for == [f"file://{tmp_path}/report.html"]


def numbers(text: str, *names: str) -> list[str]:
    """The cells of the first row of a Markdown table that begins with these cells."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {' | '.join(names)} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][len(names) :]


def test_what_a_paper_says_follows_from_the_run_folder_alone(made: Path) -> None:
    def loaded(name: str) -> Any:
        return json.loads((made / name).read_text())

    found = texts(made, filled())
    ledgers = {p.parent.name: [json.loads(x) for x in p.read_text().splitlines()] for p in made.glob("*/ledger.jsonl")}
    mine = ("prepare", "base", "taught", "zero")  # the model's ancestors; students and exams have their own costs
    spent = {stage: [line for line in lines if line["seconds"]] for stage, lines in ledgers.items()}
    hours = sum(line["seconds"] * line["cores"] for s in mine for line in spent[s]) / 3600
    watt_hours = sum(line["cpu_seconds"] for s in mine for line in spent[s]) * 12 / 3600
    training = sum(line.get("flops_training", 0) for s in ("base", "taught", "zero") for line in spent[s])
    card, form = found["MODEL_CARD.md"], found["eu/model_documentation_form.md"]
    assert float(numbers(card, "device-hours")[0]) == pytest.approx(hours, rel=1e-3)
    assert float(numbers(card, "energy (Wh)")[0]) == pytest.approx(watt_hours, rel=1e-3)
    assert float(numbers(card, "training compute (FLOP)")[0].replace(",", "")) == pytest.approx(training, rel=1e-3)
    assert float(numbers(form, "energy of training (MWh)")[0]) == pytest.approx(watt_hours / 1e6, rel=1e-3)
    shown = sum(e["activityEnergyCost"]["value"] for e in energies(found["bom.cdx.json"]))
    assert shown == pytest.approx(watt_hours / 1000)
    base, taught, data = (loaded(f"{s}/manifest.json")["results"] for s in ("base", "taught", "prepare"))
    read = base["tokens"] + taught["tokens"]
    prepared = sum(record["train_tokens"] for record in data["sources"].values())
    summary = found["eu/training_content_summary.md"]
    assert numbers(summary, "size of the text read in training")[0].endswith(f"({read:,})") and read != prepared
    assert all(f"{prepared:,}" not in text for text in found.values())
    for name, count in base["tokens_by_source"].items():
        assert numbers(form, f"{name}: tokens read in training")[0] == f"{count:,}"
        assert f"| {data['sources'][name]['train_tokens']:,} |" not in summary
        assert numbers(summary, name)[2] == f"{count:,}"
    with (made / "zero" / "model.safetensors").open("rb") as handle:
        tensors = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    sizes = {
        n: math.prod(t["shape"]) for n, t in tensors.items() if n != "__metadata__" and not n.endswith("router.bias")
    }
    parameters, mtp = sum(sizes.values()), sum(size for name, size in sizes.items() if name.startswith("mtp."))
    assert 0 < mtp < parameters
    counted = (f"{parameters:,}, {mtp:,} of them in MTP layers", f"{parameters:,}")
    assert all(numbers(found[name], "parameters")[0].startswith(counted[0]) for name in ("MODEL_CARD.md", "report.md"))
    assert numbers(form, "total parameters, MTP included")[0] == counted[1]
    assert numbers(found["report.md"], "all parameters, MTP included")[0] == counted[1]
    assert {"name": "finback:parameters", "value": counted[1]} in properties(found["bom.cdx.json"])
    assert all(f"{parameters - mtp:,}" not in text for text in found.values()), (
        "documents must agree on the parameter count"
    )
    for name, digest in re.findall(r"^\| (\S+) \| ([0-9a-f]{64}) \|$", card, re.M):
        assert hashlib.sha256((made / "zero" / name).read_bytes()).hexdigest() == digest
    for exam in ("sampled", "greedy"):
        answers = [json.loads(line) for line in (made / "after" / f"{exam}.jsonl").read_text().splitlines()]
        share = sum(a["correct"] for a in answers) / len(answers)
        row = next(line.split(" | ") for line in card.splitlines() if f"| {exam} |" in line)
        assert (row[2], float(row[3])) == (str(len(answers)), pytest.approx(share, rel=1e-3))


def energies(bom: str) -> list[dict[str, Any]]:
    card = json.loads(bom)["metadata"]["component"]["modelCard"]
    return list(card["considerations"]["environmentalConsiderations"]["energyConsumptions"])


def properties(bom: str) -> list[dict[str, str]]:
    return list(json.loads(bom)["metadata"]["component"]["properties"])


@pytest.mark.parametrize(
    "place",
    [
        "/srv/me/secret",
        "~/secret",
        "../secret",
        "C:\\\\Users\\\\me\\\\secret",
        "file:///srv/me/secret",
        "/srv/my own/secret",
    ],
)
def test_no_paper_names_a_place_of_the_machine(place: str, run: Path) -> None:
    plain = place.replace("\\\\", "\\")
    for path in (run / "prepare" / "manifest.json", *run.glob("*/config.json")):
        path.write_text(path.read_text().replace(str(run.parent), place).replace("words.txt", "of-patients.txt"))
    for name in ("base", "taught"):
        path = run / name / "config.json"
        path.write_text(path.read_text().replace('"start": ""', f'"start": "{place}/base-model"'))
    lines = read_lines(run / "base" / "ledger.jsonl")
    lines[0]["inputs"] = {f"{plain}/base-model": "0" * 64}
    write_lines(run / "base" / "ledger.jsonl", lines)
    value = read_json(run / "prepare" / "manifest.json")
    value["results"]["sources"]["words"]["files"] = [f"{plain}/of-patients.txt"] * 3
    value["results"]["note"] = f"read from {plain}/of-patients.txt, all of it"
    write_json(run / "prepare" / "manifest.json", value)
    for name, text in texts(run, filled()).items():
        assert "srv" not in text and "Users\\" not in text and "secret/" not in text and "secret\\" not in text, name
        assert "~/" not in text and "../" not in text and not re.search(r"[\s\"(>](/tmp|/home|/root|/work)\b", text), (
            name
        )
    summary = texts(run, filled())["eu/training_content_summary.md"]
    assert numbers(summary, "words")[3] == "3 files of the provider's" and "of-patients" not in summary


def test_a_data_set_is_named_by_its_link(run: Path) -> None:
    value = read_json(run / "prepare" / "manifest.json")
    words = value["results"]["sources"]["words"]
    for change, link in (
        ({"hub": "org/some.words"}, "https://huggingface.co/datasets/org/some.words"),
        ({"hub": "/data/mine"}, "1 file of the provider's"),
        ({"package": "text-of", "version": "1.2"}, "https://pypi.org/project/text-of/1.2"),
    ):
        value["results"]["sources"]["words"] = words | change
        write_json(run / "prepare" / "manifest.json", value)
        found = texts(run, filled())
        assert numbers(found["eu/training_content_summary.md"], "words")[3].replace("\\", "") == link
        assert ("datasets:" in found["MODEL_CARD.md"].split("---")[1]) == ("huggingface" in link)
        assert (link in found["bom.cdx.json"]) == link.startswith("https")


def test_identifiers_are_this_documents_own_and_new_when_it_is(made: Path) -> None:
    run, later = facts.read(made, "zero"), NOW.replace(year=2027)

    def named(answers: Answers, now: datetime = NOW, model: str = "zero") -> tuple[set[str], str]:
        found = build.documents(facts.read(made, model), answers, now)
        graph = json.loads(found["model.spdx3.json"])["@graph"]
        names = [element["spdxId"] for element in graph if "spdxId" in element]
        assert len(names) == len(set(names)) and all(re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", name) for name in names)
        assert set(re.findall(r"urn:(?:uuid|within)[^\"]*", found["model.spdx3.json"])) == set(names), (
            "every reference is to one of them"
        )
        return set(names), json.loads(found["bom.cdx.json"])["serialNumber"]

    names, serial = named(filled())
    assert named(filled()) == named(filled(), later) == (names, serial), "the time alone must not change identifiers"
    for other in (named(filled(model__version="2")), named(filled(use__limits="more")), named(filled(), model="small")):
        assert not other[0] & names and other[1] != serial
    assert run.chosen.name == "zero"


def test_stages_and_data_sets_whose_names_run_together_stay_apart(run: Path) -> None:
    for stage, name in (("taught", "x-y"), ("base", "y")):
        path = run / stage / "manifest.json"
        value = read_json(path)
        value["results"]["sources"] = {name: {"licence": "MIT", "documents": {"kept": 1}}}
        write_json(path, value)
    graph = json.loads(texts(run, filled())["model.spdx3.json"])["@graph"]
    names = [element["spdxId"] for element in graph if "spdxId" in element]
    assert len(names) == len(set(names))


def test_open_licences_are_known_however_they_are_spelt(made: Path) -> None:
    found = facts.read(made, "zero")
    for licence in ("apache 2.0", "Apache License, Version 2.0", "gplv3", "CC BY-SA 4.0", "mit", "MIT OR Apache-2.0"):
        said = completeness.contradictions(found, Answers({"model.licence": licence, "model.use_limits": "no weapons"}))
        assert any("model.use_limits forbids uses" in text for text in said), licence
        said = completeness.contradictions(found, Answers({"model.licence": licence, "model.use_limits": "None."}))
        assert not any("use_limits" in text for text in said), licence
    for licence in ("CC-BY-NC-4.0", "LicenseRef-Llama-3", "proprietary"):
        limited = Answers({"model.licence": licence, "model.use_limits": "no weapons"})
        assert not any("is open" in text for text in completeness.contradictions(found, limited))
    local = Answers({"model.licence": "MIT", "data.collection": "see /home/me/notes.txt", "data.latest": "03/2026"})
    told = completeness.contradictions(found, Answers(local.given | {"model.released": "2026-02-01"}))
    assert told == [
        "data.collection names a local file, which nobody else can read",
        "data.latest 03/2026 is after model.released 2026-02-01",
    ]
    assert told[0] in build.outcome([], build.examine(found, local, NOW)), "writing reports it too"


def test_ledgers_that_cannot_be_are_named_by_the_check(run: Path) -> None:
    with (run / "base" / "ledger.jsonl").open("a") as handle:
        handle.write('{"seconds": 1, "cores": 1, "joules": -5}\n{"seconds": NaN, "cores": 1}\n{"sec\n')
    examined = build.examine(facts.read(run, "zero"), filled(), NOW)
    count = len(read_lines(run / "base" / "ledger.jsonl"))
    assert [text.split(" says ")[-1] for text in examined.unrecorded[:3]] == [
        "joules = -5, which is ignored",
        "seconds = nan, which is ignored",
        f"base: line {count + 1} of ledger.jsonl is torn and was ignored",
    ]
    assert "nan" not in texts(run, filled())["MODEL_CARD.md"] and "joules = -5" in texts(run, filled())["report.md"]


@pytest.mark.parametrize("count", ["many", None, float("nan"), -5, [1]])
def test_a_count_that_cannot_be_is_not_provided(count: Any, run: Path) -> None:
    path = run / "base" / "manifest.json"
    value = read_json(path)
    value["results"] |= {"tokens": count, "tokens_by_source": {"words": count, "chains": 608}}
    path.write_text(json.dumps(value))
    summary = texts(run, filled())["eu/training_content_summary.md"]
    assert numbers(summary, "size of the text read in training") == [NOT_PROVIDED]
    assert numbers(summary, "words")[2] == NOT_PROVIDED and numbers(summary, "chains")[2] == "608"
