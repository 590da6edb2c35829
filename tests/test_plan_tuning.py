"""Memory of full and adapter fine-tuning against the trainer's own tensors; what fits a card, and what to change."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from finback.checkpoint.hf_config import raw_config
from finback.config import UserError, as_json
from finback.model.adaptable import adapter_size
from finback.model.config import V3, ModelConfig, to_json
from finback.model.count import parameters
from finback.model.lora import LoRA, adapter_parameters
from finback.parallel.layout import Layout
from finback.planner import hardware, traffic, tuning, tuning_time
from finback.planner.planned_stage import PlannedStage
from finback.runs.recipe import Work
from tests.test_lora import CONFIGS, adapted
from tests.toy import finback

QWEN_7B = ModelConfig(
    *(152064, 3584, 28, 28, 18944),
    attention="gqa",
    num_key_value_heads=4,
    head_dim=128,
    attention_bias="qkv",
    max_position_embeddings=32768,
)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    "targets", [("attention", "mlp", "experts"), ("attention",), ("mlp",), ("q_proj", "kv_b_proj", "o_b_proj")]
)
def test_the_size_of_an_adapter_in_closed_form(family: str, targets: tuple[str, ...]) -> None:
    if targets == ("q_proj", "kv_b_proj", "o_b_proj") and family == "mla":
        targets = ("kv_b_proj",)
    if targets == ("mlp",) and family in ("experts", "oss"):  # in every layer
        targets = ("experts",)
    model = adapted(family, LoRA(rank=3, targets=targets))
    built = sum(p.numel() for _, p in adapter_parameters(model))
    assert adapter_size(CONFIGS[family], 3, targets) == built
    if targets == ("attention",):
        long = adapted(family, LoRA(rank=3, targets=targets, dora=True))
        assert adapter_size(CONFIGS[family], 3, targets, True) == sum(p.numel() for _, p in adapter_parameters(long))


@pytest.mark.parametrize("base", ["bf16", "int8", "nf4"])
def test_weights_of_a_frozen_base_are_those_that_lie_in_memory(base: str) -> None:
    config = replace(CONFIGS["gqa"], hidden_size=128, head_dim=32, intermediate_size=192)
    CONFIGS["wide"] = config
    try:
        model = adapted("wide", LoRA(rank=4, base=base))  # type: ignore[arg-type]
    finally:
        del CONFIGS["wide"]
    held = {p.data_ptr(): p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()]}
    rotary = sum(b.numel() * 4 for n, b in model.named_buffers() if n in ("cos", "sin"))
    knobs = {"adapter": {"rank": 4, "targets": ("attention", "mlp"), "base": base}, "batch_size": 1, "seq_len": 8}
    planned = tuning.memory(config, knobs, 0.0)
    assert planned.weights == pytest.approx(sum(held.values()) - rotary, rel=0.03)
    assert planned.optimizer == 2 * planned.gradients == 8 * adapter_size(config, 4, ("attention", "mlp"))


def test_a_7b_on_one_card(tmp_path: Path) -> None:
    """Full fine-tuning never fits 24 GB; the plan says which knobs make it fit, and with them it does."""
    folder = tmp_path / "qwen"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw_config(QWEN_7B, "bfloat16")))
    (folder / "model.json").write_text(json.dumps(to_json(QWEN_7B)))
    common = f'SFT(name="sft", start={str(folder)!r}, text=(TaskText(name="t", tasks=(Chains(2, 3),), documents=9),), '
    head = "from finback.model.lora import LoRA\nfrom finback.stages.prepare import TaskText\n"
    head += "from finback.stages.sft import SFT\nfrom finback.tasks.math import Chains\n"

    def planned(knobs: str) -> dict[str, object]:
        (tmp_path / "r.py").write_text(f"{head}recipe = [{common}{knobs})]\n")
        done = finback("plan", tmp_path / "r.py", "--on", "1xrtx4090", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, object] = json.loads(done.stdout)["stages"]["sft"]
        return found

    whole = planned("")
    assert not whole["fits"] and float(str(whole["memory_bytes"])) > 16 * 7.6e9
    assert "adapter=LoRA() it takes" in str(whole["change"]) and str(whole["change"]) in str(whole["notes"])
    assert 'LoRA(base="nf4") it takes' in str(planned("batch_size=32, compute='bf16'")["change"])
    small = planned('adapter=LoRA(base="nf4"), compute="bf16"')
    assert small["fits"] and float(str(small["memory_bytes"])) < 21.6e9
    assert "change" not in small and as_json(LoRA())["rank"] == 16


def test_teachers_count_and_answers_are_made_as_room_allows() -> None:
    adapter = {"adapter": tuning.ADAPTER | {"base": "nf4"}, "compute": "bf16"}
    sft = adapter | {"batch_size": 1, "seq_len": 512}
    alone, taught = (tuning.memory(QWEN_7B, sft, 0.0, teachers=t) for t in ((), (QWEN_7B,)))
    assert taught.total - alone.total == taught.reference == 4 * parameters(QWEN_7B)
    rl = adapter | {"task": "t", "prompts_per_step": 32, "num_generations": 8, "max_tokens": 2048, "micro_tokens": 4096}
    # by hand: 28 layers of 2 x 4 heads of 128 numbers in bf16
    whole, each = tuning.memory(QWEN_7B, rl, 2e9), 2048 * 28 * 2 * 4 * 128 * 2
    assert whole.cache == 256 * each
    room, states = 21.6e9, whole.total - whole.cache - whole.activations - whole.working
    on_card = tuning.memory(QWEN_7B, rl, 2e9, room)
    assert on_card.cache == (room - states) / 2 and on_card.total < room
    assert tuning.memory(QWEN_7B, rl, 2e9, states).cache == each, "the cache holds at least one answer"


def test_a_model_that_answers_counts_too() -> None:
    knobs = {"start": "x", "exams": [{"max_tokens": 100}, {"max_tokens": 4096}], "dtype": "fp32"}
    whole = tuning.memory(QWEN_7B, knobs, 2e9)
    assert whole.weights == 4 * parameters(QWEN_7B) and whole.cache == 256 * 4096 * 28 * 2 * 4 * 128 * 4
    taken, least = tuning.changes(QWEN_7B, knobs, 2e9, 21.6e9)
    assert taken == ['dtype="bf16"'] and 15.2e9 < least < 21.6e9


def test_what_to_change_names_what_takes_less_and_nothing_else() -> None:
    knobs = {"adapter": tuning.ADAPTER | {"base": "nf4"}, "compute": "bf16", "recompute": None, "batch_size": 8}
    knobs |= {"seq_len": 2048}
    total = tuning.memory(QWEN_7B, knobs, 2e9).total
    assert tuning.changes(QWEN_7B, knobs, 2e9, total) == ([], total)
    taken, least = tuning.changes(QWEN_7B, knobs, 2e9, 14.4e9)
    assert taken == ["one row at a time"] and least <= 14.4e9
    assert tuning.changes(QWEN_7B, knobs | {"adapter": None}, 2e9, 1e9)[0][-1] == "one row at a time"
    knobs |= {"adapter": None, "recompute": "block", "moments": "fp32"}
    exact, lean, away = (tuning.memory(QWEN_7B, knobs | {"moments": m}, 0.0) for m in ("fp32", "int8", "host"))
    scale = 2 * 4 / 256 * parameters(QWEN_7B)
    assert lean.optimizer == exact.optimizer / 4 + scale and away.optimizer == 0
    for room, wanted in ((lean.total, ['moments="int8"']), (away.total, ['moments="host"'])):
        assert tuning.changes(QWEN_7B, knobs, 0.0, room)[0] == wanted
    assert tuning.changes(QWEN_7B, knobs, 0.0, 3e10)[0][0] == "adapter=LoRA()", "instead of 8-bit moments"
    shared = tuning.memory(QWEN_7B, knobs | {"moments": "int8"}, 0.0, layout=Layout(dp=2))
    assert shared.optimizer == lean.optimizer / 2
    assert tuning.changes(QWEN_7B, knobs, 0.0, shared.total, layout=Layout(dp=2))[0] == ['moments="int8"']


def test_a_layout_shares_out_all_but_an_adapter_and_what_is_put_together() -> None:
    """By hand: Qwen2.5-7B on 4 ranks: 2 data ranks, whose rows are split in two."""
    layout, size = Layout(dp=2, cp=2), parameters(QWEN_7B)
    sft = {"adapter": None, "batch_size": 6, "seq_len": 512}
    one, four = (tuning.memory(QWEN_7B, sft, 0.0, teachers=(QWEN_7B,), layout=given) for given in (None, layout))
    for part in ("weights", "gradients", "optimizer", "reference"):
        assert getattr(four, part) == getattr(one, part) / 4
    assert four.activations == pytest.approx(one.activations / 4) and four.served == one.gathered == 0
    # embedding and head, and two layers, in fp32 with gradients
    layer = 3584 * (3584 + 3584 + 2 * 512 + 3 * 18944 + 2) + 3584 + 2 * 512
    assert four.gathered == 8 * (2 * 152064 * 3584 + 2 * layer)
    rl = {"adapter": tuning.ADAPTER, "compute": "bf16", "task": "t", "prompts_per_step": 32, "num_generations": 8}
    rl |= {"max_tokens": 2048, "micro_tokens": 4096, "objective": {"beta": 0.1}}
    one, four = (tuning.memory(QWEN_7B, rl, 0.0, layout=given) for given in (None, layout))
    learnt = adapter_size(QWEN_7B, 16, ("attention", "mlp", "experts"))
    assert four.optimizer == one.optimizer == 8 * learnt and four.weights == 2 * size / 4 + 4 * learnt
    assert four.served == 2 * size and four.cache == one.cache / 4 and four.reference == 0
    assert four.gathered == 2 * (2 * 152064 * 3584 + 2 * layer)
    # the adapters of V3's 58 layers of 256 experts are sharded over 8 ranks
    experts = 58 * 256 * 16 * (2 * 7168 + 3 * 2048)
    assert tuning.learnt_numbers(V3, tuning.ADAPTER, 8) == tuning.learnt_numbers(V3, tuning.ADAPTER) - experts * 7 / 8
    rl |= {"objective": {}}
    split, full = (tuning.memory(V3, rl, 0.0, layout=Layout(dp=8, ep=ep)) for ep in (8, 1))
    assert (split.served - full.served, full.gradients - split.gradients) == (4 * experts, 4 * experts * 7 / 8)
    whole = rl | {"adapter": None}
    taken, least = tuning.changes(QWEN_7B, whole, 2e9, 50e9, layout=layout)
    assert taken[-1] == "adapter=LoRA()" and least < 50e9
    assert "nf4" in tuning.changes(QWEN_7B, whole, 2e9, 1e9, layout=layout)[0][-2]
    packed = tuning.memory(QWEN_7B, rl | {"adapter": tuning.ADAPTER | {"base": "nf4"}}, 0.0, layout=layout)
    assert packed.gathered == 2 * 2 * 152064 * 3584 + 2 * 0.5625 * layer
    assert packed.served == tuning.frozen_bytes(QWEN_7B, tuning.ADAPTER | {"base": "nf4"}) < 0.4 * four.served


def test_bf16_weights_have_no_masters() -> None:
    """By hand: two bytes less for each number in Qwen2.5-7B's 28 layers, except for norms and biases."""
    sft = {"adapter": None, "batch_size": 8, "seq_len": 512, "compute": "bf16"}
    exact, rounded = (tuning.memory(QWEN_7B, sft | {"weights": w}, 0.0) for w in ("fp32", "bf16"))
    hidden = 28 * 3584 * (3584 + 3584 + 2 * 512 + 3 * 18944)
    assert exact.weights - rounded.weights == exact.total - rounded.total == 2 * hidden


def test_zero1_shares_out_moments_and_what_is_frozen() -> None:
    """By hand: Qwen2.5-7B on 4 ranks, which hold it whole and generate with it; and V3, whose experts are split."""
    layout, size = Layout(dp=4, sharding="zero1"), parameters(QWEN_7B)
    sft = {"adapter": None, "batch_size": 8, "seq_len": 512}
    found = tuning.memory(QWEN_7B, sft, 0.0, layout=layout)
    assert (found.weights, found.gradients, found.optimizer) == (4 * size, 4 * size, 8 * size / 4)
    assert found.gathered == found.served == found.reference == 0
    rl = {"adapter": None, "task": "t", "prompts_per_step": 4, "num_generations": 4, "max_tokens": 512}
    rl |= {"micro_tokens": 4096, "steps": 10, "objective": {"beta": 0.1}, "compute": "bf16"}
    found = tuning.memory(QWEN_7B, rl, 0.0, layout=layout)
    layer = 3584 * (3584 + 3584 + 2 * 512 + 3 * 18944 + 2) + 3584 + 2 * 512
    assert (found.reference, found.gathered, found.served) == (size, 4 * (2 * 152064 * 3584 + 2 * layer), 0)
    routed = 59 * 256 * 3 * 7168 * 2048
    found = tuning.memory(
        V3, sft | {"task": "t", "prompts_per_step": 8, "max_tokens": 512}, 0.0, layout=replace(layout, ep=4)
    )
    assert found.weights == pytest.approx(4 * (parameters(V3) - routed * 3 / 4), rel=1e-3)
    assert found.optimizer == 8 * parameters(V3) / 4 and found.served == 4 * parameters(V3)
    assert tuning.changes(QWEN_7B, rl, 2e9, 80e9, layout=layout)[0][0] == 'sharding="fsdp"'
    # one exchange of fp32 gradients and weights per update, which passes do not hide
    site = hardware.site("h800:4", ())
    stage = PlannedStage("rl", "GRPO", False, rl | {"layout": {"dp": 4, "sharding": "zero1"}}, Work(10**7), QWEN_7B)
    seconds = tuning_time.beside_products(stage, site, 1e9)
    assert seconds == pytest.approx(tuning_time.updates(stage) * 8 * size * 3 / 4 / 160e9)
    assert tuning.changes(QWEN_7B, rl, 2e9, 80e9, layout=replace(layout, bucket_mb=25.0))[0][0] == 'sharding="fsdp"'
    rounded = replace(stage, knobs=rl | {"layout": {"dp": 4, "sharding": "zero1", "reduce": "bf16"}})
    assert tuning_time.beside_products(rounded, site, 1e9) == pytest.approx(seconds * 6 / 8)
    assert tuning.memory(QWEN_7B, rl, 0.0, layout=replace(layout, reduce="bf16")).gradients == 6 * size


def test_a_layout_takes_time_for_what_ranks_send() -> None:
    """The experts' all-to-all by hand; long passes hide all gathering except a whole copy per step of answers."""
    knobs = {"compute": "bf16", "adapter": None, "task": "t", "steps": 10, "prompts_per_step": 4, "num_generations": 4}
    knobs |= {"max_tokens": 512, "micro_tokens": 4096, "layout": {"dp": 4, "ep": 4}}
    stage = PlannedStage("rl", "GRPO", False, knobs, Work(tokens_trained=4 * 4096 * 10), V3)
    site = hardware.site("h800:4", ())
    short, long = (tuning_time.beside_products(stage, site, seconds) for seconds in (0.0, 1e9))
    link = 160e9
    # two bytes per number, there and back, forward and backward, for 58 layers and MTP's, to other devices
    sent = 4096 * 10 * 59 * 8 * 7168 * traffic.spread(V3, 4, 4, 0.0).forwarded
    copies = 10 * 2 * parameters(V3) * 3 / 4
    assert long == pytest.approx((sent + copies) / link)
    # for 10 passes: fp32 gradients once and fp32 weights twice, without the experts, which are only here
    routed = 59 * 256 * 3 * 7168 * 2048
    assert short - long == pytest.approx(10 * 12 * (parameters(V3) - routed) * 3 / 4 / link, rel=1e-3)
    assert tuning_time.on_host(stage, site, 0.0) == 0.0
    with pytest.raises(UserError, match=r"--on = 'h800:8': the layout of rl has 4 ranks, not 8\. Use 4 devices"):
        tuning_time.check_ranks(stage, hardware.site("h800:8", ()), "h800:8")


def test_what_lies_on_the_host_takes_no_device_memory_but_time() -> None:
    """By hand: Qwen2.5-7B on 4 ranks: shards in host memory, then moments alone there."""
    layout, size = Layout(dp=4, offload=True), parameters(QWEN_7B)
    sft = {"adapter": None, "batch_size": 8, "seq_len": 512, "compute": "bf16", "layout": {"dp": 4, "offload": True}}
    here, away = (tuning.memory(QWEN_7B, sft, 0.0, teachers=(QWEN_7B,), layout=on) for on in (Layout(dp=4), layout))
    assert (away.weights, away.gradients, away.optimizer, away.reference) == (0, 0, 0, 0)
    assert away.total == here.total - 20 * size / 4
    lora = sft | {"adapter": tuning.ADAPTER}
    found, learnt = tuning.memory(QWEN_7B, lora, 0.0, layout=layout), tuning.learnt_numbers(QWEN_7B, tuning.ADAPTER)
    assert (found.weights, found.gradients, found.optimizer) == (4 * learnt, 4 * learnt, 8 * learnt)
    # five steps of one pass: weights twice, gradients, and AdamW's 28 bytes; longer passes hide the transfer
    site, work = hardware.site("h100:4", ("host=1e10",)), Work(tokens_trained=5 * 8 * 512)
    stage = PlannedStage("sft", "SFT", False, sft, work, QWEN_7B)
    assert tuning_time.updates(stage) == 5
    assert tuning_time.on_host(stage, site, 0.0) == pytest.approx(5 * (12 + 28) * size / 4 / 1e10)
    assert tuning_time.on_host(stage, site, 1e9) == pytest.approx(5 * 28 * size / 4 / 1e10)
    frozen = PlannedStage("lora", "SFT", False, lora, work, QWEN_7B)
    fetched = 2 * tuning.frozen_bytes(QWEN_7B, tuning.ADAPTER) / 4
    assert tuning_time.on_host(frozen, site, 0.0) == pytest.approx(5 * fetched / 1e10)
    both = PlannedStage("lora", "SFT", False, lora | {"moments": "host"}, work, QWEN_7B)
    assert tuning_time.on_host(both, site, 1e9) == pytest.approx(5 * 16 * learnt / 1e10)
    alone = PlannedStage("sft", "SFT", False, sft | {"layout": None, "moments": "host"}, work, QWEN_7B)
    assert tuning_time.on_host(alone, site, 1e9) == pytest.approx(5 * 16 * size / 1e10)
