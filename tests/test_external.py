"""External engines in the ledger: tokens, time and money of servers and fleets, and what is unknown."""

from pathlib import Path
from typing import Any

import pytest

from finback.client import RequestFailed
from finback.config import UserError
from finback.parallel.mesh import World
from finback.planner import plan_vs_actual
from finback.report import summary
from finback.report.docs.facts import MISSING, StageFacts
from finback.rollouts.fleet import Fleet
from finback.rollouts.servers import Servers
from finback.runs import reader
from finback.runs.external import EnginePrice, TokenCount
from finback.runs.files import read_lines
from finback.runs.folder import StageRun
from finback.runs.ledger import cost
from finback.serve.runs import overview
from finback.stages.distill import Distill
from finback.train.loop import Loop
from tests.engine_servers import engine_server
from tests.test_rollouts import QUICK, learning
from tests.test_teachers import LONG, ON_POLICY, SHORT
from tests.test_tuning import stage_folder, tune

URL = ("http://127.0.0.1:9",)


@pytest.mark.parametrize(
    ("price", "dollars"),
    [
        (Servers(URL).price, None),
        (Servers(URL, price_in=0.0, price_out=0.0).price, 0.0),
        (Servers(URL, price_in=2.0, price_out=10.0, num_cpus=8).price, (3000 * 2 + 500 * 10) / 1e6),
        (Servers(URL, price_hour=1.5, num_cpus=8).price, 1.5 * 2),
        (Servers(URL, num_cpus=8).price, 8 * 0.04 * 2),
        (Fleet(3, num_cpus=2).price, 2 * 0.04 * 2),
        (Fleet(3, num_gpus=1).price, None),
        (Fleet(3, num_gpus=1, price_hour=2.5).price, 2.5 * 2),
    ],
)
def test_prices_by_hand(price: EnginePrice, dollars: float | None) -> None:
    """Two engine-hours in which 3,000 tokens are read and 500 generated."""
    assert price.dollars(7200, 3000, 500) == (None if dollars is None else pytest.approx(dollars))


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"price_in": 1.0}, r"rollouts\.price_out = None: missing, although price_in is given"),
        ({"price_out": 1.0}, r"rollouts\.price_in = None: missing, although price_out is given"),
        ({"price_in": 1.0, "price_out": 2.0, "price_hour": 3.0}, r"rollouts\.price_hour = 3\.0: tokens have a price"),
        ({"price_hour": -1.0}, r"rollouts\.price_hour = -1\.0"),
        ({"num_cpus": 0}, r"rollouts\.num_cpus = 0"),
    ],
)
def test_half_a_price_is_refused(knobs: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        Servers(URL, **knobs)


class ThreeRanks(World):
    """Rank 0 of three, each of which has the same counts."""

    def gather(self, value: Any) -> list[Any]:
        return [value] * 3


def hired(root: Path, price: EnginePrice, knows_flops: bool = True, engines: int = 2) -> StageRun:
    """A run of which engines have worked for ten seconds, and read 100 and generated 7 tokens each."""
    run = StageRun(root, "zero", 0, ThreeRanks(), quiet=True)
    run.folder.mkdir(parents=True)
    counts = [TokenCount() for _ in range(engines)]
    found = run.hire("zero.rollouts", price, counts, knows_flops)
    for count in counts:
        count.add(100, 7)
    found._mark -= 10
    found.leave()
    return run


def test_bills_add_up_over_engines_and_ranks(tmp_path: Path) -> None:
    run = hired(tmp_path, EnginePrice(1.0, 10.0, num_cpus=4))
    run.gather_external()
    run.account(tokens_generated=42)
    run.gather_external()
    run.account()  # nothing is left to bill
    bill = cost(run.folder)
    external = bill["external"]
    assert external["tokens_external_prompt"] == 3 * 2 * 100 and external["tokens_external_generated"] == 3 * 2 * 7
    assert external["external_seconds"] == pytest.approx(20, abs=1)
    assert external["external_core_seconds"] == pytest.approx(4 * external["external_seconds"])
    assert external["external_usd"] == pytest.approx((600 * 1 + 42 * 10) / 1e6)
    own = bill["wall_seconds"] * 0.04 / 3600
    assert bill["money_usd"] == pytest.approx(own + external["external_usd"], abs=1e-4) and bill["unknown"] == []
    # 80 core-seconds at 12 W, beside those of this process
    assert bill["energy_wh"] >= round(external["external_core_seconds"] * 12 / 3600, 3)
    assert (
        "external engines read 600 tokens and generated 42 in 20 engine-seconds, $0.00102 of the money" in bill["basis"]
    )


def test_what_is_unknown_is_said_wherever_costs_are(tmp_path: Path) -> None:
    """Never as 0: in the ledger, the summary, the plan's comparison, on the page and in documents."""
    run = hired(tmp_path, EnginePrice(), knows_flops=False)
    run.gather_external()
    run.account(tokens_trained=1, flops_auxiliary=5.0)
    row = list(read_lines(run.folder / "ledger.jsonl"))[-1]
    assert not {"external_usd", "external_core_seconds", "external_joules"} & row.keys()
    bill = cost(run.folder)
    assert bill["unknown"] == [f"{what} of zero.rollouts" for what in ("FLOPs", "energy", "money")]
    assert all(f"unknown and NOT included: {text}" in bill["basis"] for text in bill["unknown"])
    text = summary._costs({"zero": {"cost": bill}}, tmp_path)
    assert text.count("+ unknown") == 3 and "Unknown and not included: FLOPs of zero.rollouts, energy" in text
    actual = {name: bill[key] for name, key in plan_vs_actual.SPENT.items()}
    told = {"plan": None, "actual": actual, "unknown": bill["unknown"]}
    assert plan_vs_actual.text({"stages": {"zero": told}, "notes": []}).count("+ unknown") == 1
    page = overview("toy", tmp_path, reader.stages(tmp_path, lenient=True))
    assert page["unknown"] == page["stages"][0]["unknown"] == bill["unknown"] and "NOT included: money" in page["basis"]
    facts = StageFacts(run.folder, {})
    for found in (facts.dollars, facts.watt_hours, facts.device_hours, facts.spent("flops_auxiliary")):
        assert found is MISSING
    assert facts.spent("tokens_trained") == 1


def test_meters_of_this_machine_include_a_fleet_on_it(tmp_path: Path) -> None:
    for number, (here, joules) in enumerate([(True, 0.0), (False, 20 * 12.0)]):
        run = hired(tmp_path / str(number), EnginePrice(num_cpus=1, is_here=here))
        (engines,) = run.external
        assert engines.bill(metered=True)["external_joules"] == pytest.approx(joules, rel=0.1)
        assert "unknown" not in engines.bill(metered=True)
    gpus = hired(tmp_path / "gpus", EnginePrice(num_cpus=1, num_gpus=1, price_hour=1.0)).external[0].bill(False)
    assert gpus["unknown"] == ["energy of zero.rollouts"] and gpus["external_usd"] == pytest.approx(20 / 3600, rel=0.1)


@pytest.mark.parametrize("prices", [{}, {"price_in": 3.0, "price_out": 9.0}])
def test_a_teacher_on_servers_is_in_the_ledger(prices: dict[str, Any], tmp_path: Path) -> None:
    """It reads each answer of its domain once; the other teacher's FLOPs are counted here."""
    stage_folder(tmp_path, 1, "base")
    stage_folder(tmp_path, 2, "other")
    with engine_server(tmp_path / "other", "vllm") as (url, server):
        teachers = {SHORT.name: "other", LONG.name: Servers((url,), **QUICK, **prices)}
        t = tune(tmp_path, Distill, teacher=teachers, top_k=5, **ON_POLICY)
        looped = Loop(t)
        for _ in range(2):
            looped.advance()
        looped.account()
        read = [len(body["prompt"]) for path, body in server.seen if path == "/v1/completions"]
        t.close()
    bill = cost(t.run.folder)
    assert read and bill["external"]["tokens_external_prompt"] == sum(read)
    assert bill["external"]["tokens_external_generated"] == len(read)
    assert bill["external"]["external_seconds"] > 0 < bill["flops_by"]["auxiliary"]
    name = f"tuned.teacher.{LONG.name}"
    if prices:
        assert bill["unknown"] == [f"FLOPs of {name}", f"energy of {name}"]
        assert bill["external"]["external_usd"] == pytest.approx((3 * sum(read) + 9 * len(read)) / 1e6)
    else:
        assert bill["unknown"] == [f"FLOPs of {name}", f"energy of {name}", f"money of {name}"]


def test_only_servers_teach_so_no_flops_are_said(tmp_path: Path) -> None:
    stage_folder(tmp_path, 1, "base")
    stage_folder(tmp_path, 2, "other")
    with engine_server(tmp_path / "other", "vllm") as (url, _):
        t = tune(tmp_path, Distill, teacher=Servers((url,), **QUICK), top_k=5, **ON_POLICY)
        looped = Loop(t)
        looped.advance()
        looped.account()
        t.close()
    assert "auxiliary" not in cost(t.run.folder)["flops_by"]
    assert StageFacts(t.run.folder, {}).spent("flops_auxiliary") is MISSING


def test_servers_of_rl_are_in_the_ledger(tmp_path: Path) -> None:
    """What they generate is what the stage accounts for, and the answers to the probes beside it."""
    with engine_server(learning(tmp_path / "base").run.root / "base") as (url, server):
        r = learning(tmp_path / "run", rollouts=Servers((url,), **QUICK, price_hour=7.2))
        looped = r.loop()
        looped.advance()
        looped.account()
        seen = [body for path, body in server.seen if path.endswith("generate")]
        probes = [body for body in seen if body["sampling_params"]["seed"] == 0]
        r.close()
    bill = cost(r.run.folder)
    assert bill["external"]["tokens_external_prompt"] == sum(len(body["token_ids"]) for body in seen)
    probed = sum(body["sampling_params"]["max_tokens"] for body in probes)
    assert bill["external"]["tokens_external_generated"] == bill["tokens_generated"] + probed and probes
    assert bill["external"]["external_usd"] == pytest.approx(bill["external"]["external_seconds"] * 7.2 / 3600)
    assert bill["unknown"] == ["energy of zero.rollouts"] and bill["flops_by"]["generation"] > 0


def test_engines_are_paid_for_when_the_stage_fails(tmp_path: Path) -> None:
    run = hired(tmp_path, EnginePrice(price_hour=3.6))
    with pytest.raises(RequestFailed), run.billed():
        raise RequestFailed("gone")
    bill = cost(run.folder)
    assert bill["external"]["external_usd"] == pytest.approx(0.02, rel=0.1)
    assert bill["external"]["tokens_external_prompt"] == 200, "of this rank"
    none = StageRun(tmp_path, "none", 0, World(), quiet=True)
    none.folder.mkdir()
    with pytest.raises(RequestFailed), none.billed():
        raise RequestFailed("gone")
    assert not list(none.folder.iterdir())
