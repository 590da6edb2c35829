"""Lessons, their packing, fine-tuning, distillation and rejection sampling on a toy model."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from finback.checkpoint import models
from finback.config import UserError
from finback.data import tokenizer
from finback.data.messages import IGNORE, Lesson, encode_document, encode_prompt, lessons
from finback.data.rows import arrange
from finback.data.sources import Files
from finback.data.template import Template
from finback.data.tokenizer import Tokenizer
from finback.data.turn import Message
from finback.model import logprobs
from finback.parallel.mesh import World
from finback.runs.files import read_lines
from finback.runs.folder import Interrupted, StageRun
from finback.stages.distill import Distill
from finback.stages.fine_tuning import FineTuning
from finback.stages.reject import Reject, choose
from finback.stages.sft import SFT, LessonBatches
from finback.stages.teachers import DistillationTeacher
from finback.tasks.math import Chains
from finback.train import loop
from finback.train.batch import of_lessons
from finback.train.lean_adam import Moments
from finback.train.loss import LossTerms, cross_entropy, distillation
from tests.toy import WORDS, backward_batch, toy_model


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer.train([WORDS], 320, tmp_path_factory.mktemp("words") / "tokenizer.json")


def taught(lesson: Lesson, words: Tokenizer) -> str:
    return words.decode([i for i in lesson.labels if i != IGNORE], skip_special=False)


TALK = (
    Message("user", "hi"),
    Message("assistant", "well"),
    Message("user", "1+1?"),
    Message("assistant", "2", "one and one"),
)


def test_a_lesson_is_what_the_assistant_said(words: Tokenizer) -> None:
    (lesson,) = lessons(TALK, words)
    assert lesson.ids == encode_document(TALK, words)
    eos = "<｜end▁of▁sentence｜>"
    assert taught(lesson, words) == f"well{eos}<think>one and one</think>2{eos}"


def test_chains_of_earlier_turns_are_taught_apart_and_never_read(words: Tokenizer) -> None:
    talk = (Message("user", "a"), Message("assistant", "b", "why"), *TALK[2:])
    whole, first = lessons(talk, words)
    assert taught(whole, words) == taught(lessons(TALK, words)[0], words).split("｜>", 1)[1]
    assert "why" not in words.decode(whole.ids) and taught(first, words).startswith("<think>why</think>b")
    # a labelled answer follows exactly the prompt that the model will see
    prompt, _ = encode_prompt(talk[:3], words)
    assert whole.ids[: len(prompt)] == prompt


def test_a_system_message_stands_first_and_is_not_taught(words: Tokenizer) -> None:
    (lesson,) = lessons((Message("system", "be kind"), *TALK[:2]), words)
    assert words.decode(lesson.ids, skip_special=True).startswith("be kind") and "kind" not in taught(lesson, words)


@pytest.mark.parametrize("opens", ["", "<think>\n"])
def test_a_template_writes_the_prompt(words: Tokenizer, opens: str) -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[A]" + opens
    own = Tokenizer(words.path)
    own.template = Template(source + "{% endif %}", {})
    first, second = lessons(TALK, own)
    assert taught(second, own) == ("" if opens else "<think>\n") + "one and one\n</think>\n\n2<｜end▁of▁sentence｜>"
    assert own.decode(second.ids, skip_special=False).startswith("[user]hi[assistant]well[user]1+1?[A]" + opens)
    assert taught(first, own).endswith("well<｜end▁of▁sentence｜>")


def test_nothing_to_learn_is_refused(words: Tokenizer) -> None:
    with pytest.raises(UserError, match="there is no assistant turn"):
        lessons((Message("user", "hi"),), words)


def test_rows_are_filled_and_nothing_is_lost() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(3, 60) for _ in range(3000)]
    rows = arrange(lengths, 64, rng)
    assert sorted(i for row in rows for i in row) == list(range(3000))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 64 and sum(filled) / (64 * len(rows)) > 0.97
    assert arrange(lengths, 64, random.Random(1)) != rows


def test_packed_targets_stop_at_the_end_of_a_lesson() -> None:
    one = Lesson([5, 6, 7, 8], [IGNORE, 6, 7, 8])
    two = Lesson([9, 10, 11], [IGNORE, IGNORE, 11])
    batch, n = of_lessons([[one, two], [two]], depths=1), IGNORE
    assert batch.labels_at(0).tolist() == [[6, 7, 8, n, n, 11, n], [n, 11, n, n, n, n, n]]
    assert batch.labels_at(1).tolist() == [[7, 8, n, n, 11, n, n], [11, n, n, n, n, n, n]]
    _, padding_mask, document_ids = batch.inputs
    assert document_ids is not None and document_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    assert padding_mask is not None and padding_mask.sum() == 10 and batch.tokens.size(1) == 8
    assert batch.lengths() == [4, 3, 3] and batch.learnt.sum() == 5 and batch.counts(1).tolist() == [5, 4]


def stage_folder(root: Path, seed: int, name: str) -> None:
    folder = root / name
    if not folder.exists():
        folder.mkdir()
        tokenizer.train([WORDS], 320, folder / "tokenizer.json")
        models.save(folder, toy_model(seed))
        (folder / "manifest.json").write_text("{}")


def write_traces(root: Path, count: int = 60) -> None:
    (root / "kept").mkdir(exist_ok=True)
    (root / "kept" / "manifest.json").write_text("{}")
    lines = []
    for i in range(count):
        chain = "" if i % 3 else f"{i} is {i}"
        said = {"role": "assistant", "content": str(i), "reasoning_content": chain}
        lines.append(json.dumps({"messages": [{"role": "user", "content": f"{i}?"}, said]}))
    (root / "kept" / "traces.jsonl").write_text("\n".join(lines))


def tune(root: Path, kind: type[SFT] = SFT, name: str = "tuned", **knobs: Any) -> FineTuning:
    stage_folder(root, 1, "base"), stage_folder(root, 2, "other"), write_traces(root)
    run = StageRun(root, name, 0, World(), quiet=True)
    run.folder.mkdir(exist_ok=True)
    settings = {"start": "base", "traces": ("kept",), "batch_size": 2, "seq_len": 48, "epochs": 2} | knobs
    return kind(name=name, **settings).training(run)


def lesson_batches(t: FineTuning) -> LessonBatches:
    assert isinstance(t.batches, LessonBatches)
    return t.batches


def gradient(t: FineTuning) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in t.trainer.model.parameters() if p.grad is not None])


def test_the_packed_gradient_is_that_of_lessons_alone(tmp_path: Path) -> None:
    t = tune(tmp_path, mtp_weight=0.0, balance_alpha=0.0)
    given, model = lesson_batches(t), t.trainer.model
    rows = [[given.lessons[i] for i in row] for row in given.order[0]]
    batch = of_lessons(rows)
    count = int(batch.learnt.sum())
    t.trainer.zero()
    backward_batch(model, batch, batch.counts(0), 0.0, 0.0)
    together = gradient(t)
    t.trainer.zero()
    for lesson in (lesson for row in rows for lesson in row):
        ids = torch.tensor([lesson.ids])
        targets = torch.tensor(lesson.labels[1:]) != IGNORE
        logits = model.logits(model(ids[:, :-1])[0])[targets]
        (F.cross_entropy(logits, ids[0, 1:][targets], reduction="sum") / count).backward()
    torch.testing.assert_close(together, gradient(t), rtol=1e-3, atol=1e-6)


def test_sft_learns_its_lessons_and_says_what_it_read(tmp_path: Path) -> None:
    t = tune(tmp_path, lr=1e-2, epochs=12)
    results = loop.run(t)
    losses = [r["loss"] for r in read_lines(tmp_path / "tuned/metrics.jsonl")]
    assert losses[-1] < 0.5 * losses[0]
    assert results["lessons_by_source"] == {"kept": 60} and results["filled"] > 0.8 and results["too_long"] == 0
    assert models.load(tmp_path / "tuned").config == t.config


def test_bare_answers_leave_the_chains_out(tmp_path: Path) -> None:
    with_chains, bare = tune(tmp_path), tune(tmp_path, chains=False)
    mark = with_chains.tokenizer.ids["<think>"]
    assert sum(mark in lesson.ids for lesson in lesson_batches(with_chains).lessons) == 20
    assert not any(mark in lesson.ids for lesson in lesson_batches(bare).lessons)


@pytest.mark.parametrize("moments", ["fp32", "int8"])
def test_an_interrupted_tuning_ends_with_the_same_bits(moments: Moments, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one = tune(tmp_path / "a", moments=moments)
    loop.run(one)
    two = tune(tmp_path / "b", moments=moments).loop()
    for _ in range(3):
        two.advance()
    two.checkpoint()
    two.advance()  # lost
    again = tune(tmp_path / "b", moments=moments)
    loop.run(again)
    for a, b in zip(one.trainer.model.state_dict().values(), again.trainer.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_sources_are_limited_and_named_apart(tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text('{"question": "a", "answer": "b"}\n' * 30)
    t = tune(tmp_path, text=(Files((str(more),), name="more"),), limits={"more": 7})
    assert t.batches.results["lessons_by_source"] == {"kept": 60, "more": 7}
    with pytest.raises(UserError, match=r"tuned\.limits = 'mroe'"):
        tune(tmp_path, limits={"mroe": 7})
    with pytest.raises(UserError, match="the same name"):
        tune(tmp_path, text=(Files((str(more),), name="kept"),))
    (tmp_path / "plain.txt").write_text("no turns here")
    with pytest.raises(UserError, match=r"tuned\.text = 'no turns here'"):
        tune(tmp_path, traces=(), text=(Files((str(tmp_path / "plain.txt"),)),))
    with pytest.raises(UserError, match=r"tuned\.seq_len = 1000"):
        tune(tmp_path, seq_len=1000)


# ---- distillation ------------------------------------------------------------------------------------------------------


def test_divergences_by_hand() -> None:
    student, teacher = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    half = 0.25 * torch.tensor(2.0).log()
    torch.testing.assert_close(distillation(student, teacher, "forward"), half[None])  # 1/2 ln 2 - 1/4 ln 2
    torch.testing.assert_close(distillation(student, teacher, "reverse"), half[None])
    p, q = torch.randn(5, 40), torch.randn(5, 40)
    exact = F.kl_div(p.log_softmax(-1), q.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(distillation(p, q, "forward"), exact)
    torch.testing.assert_close(distillation(q, p, "reverse"), exact)
    few = distillation(p, q, "forward", top_k=5)
    assert (few <= exact + 1e-6).all() and (few > 0).all()
    torch.testing.assert_close(distillation(p, p, "forward", top_k=5), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(distillation(p, q, "reverse", top_k=40), distillation(p, q, "reverse"))


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    t = tune(tmp_path, Distill, teacher="base", mtp_weight=0.0, balance_alpha=0.0)
    metrics = t.loop().advance()
    assert metrics["loss"] == pytest.approx(0, abs=1e-5) and metrics["grad_norm"] < 1e-3


@pytest.mark.parametrize("form", ["forward", "reverse"])
def test_a_student_comes_closer_to_its_teacher(tmp_path: Path, form: str) -> None:
    t = tune(tmp_path, Distill, teacher="other", divergence=form, lr=1e-2, epochs=8, mtp_weight=0.0)
    loop.run(t)
    losses = [r["loss"] for r in read_lines(tmp_path / "tuned/metrics.jsonl")]
    assert losses[-1] < 0.6 * losses[0]


def test_a_divergence_in_chunks_is_that_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = tune(tmp_path, Distill, teacher="other", mtp_weight=0.0, hard=0.25)
    batch, model = t.batches.batch(1)[0], t.trainer.model
    assert batch is not None and isinstance(t.teacher, DistillationTeacher)
    tokens, _, document_ids = batch.inputs
    found = []
    for elements in (logprobs.ELEMENTS, 320 * 8):
        monkeypatch.setattr(logprobs, "ELEMENTS", elements)
        model.zero_grad()
        loss = t.teacher.loss(model(tokens, document_ids=document_ids), batch)
        loss.backward()
        found.append([loss.detach(), model.embed.grad.clone(), model.head.weight.grad.clone()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_on_policy_the_student_is_corrected_where_it_goes(tmp_path: Path) -> None:
    knobs = {
        "teacher": "other",
        "traces": (),
        "task": Chains(2, 3),
        "prompts_per_step": 8,
        "max_tokens": 8,
        "mtp_weight": 0.0,
    }
    t = tune(tmp_path, Distill, steps=30, lr=1e-2, divergence="reverse", **knobs)
    loop.run(t)
    losses = [r["loss"] for r in read_lines(tmp_path / "tuned/metrics.jsonl")]
    assert len(losses) == 30 and sum(losses[-3:]) < 0.6 * sum(losses[:3])
    with pytest.raises(UserError, match=r"tuned\.task"):
        tune(tmp_path, Distill, **knobs | {"traces": ("kept",)})


def test_hard_targets_alone_are_sft(tmp_path: Path) -> None:
    t = tune(tmp_path, Distill, teacher="other", hard=1.0)
    batch, model = t.batches.batch(1)[0], t.trainer.model
    assert batch is not None and isinstance(t.teacher, DistillationTeacher)
    tokens, _, document_ids = batch.inputs
    hidden = model(tokens, document_ids=document_ids)
    expected = cross_entropy(hidden.flatten(0, 1), model.head.weight, batch.labels_at(0).flatten())
    torch.testing.assert_close(t.teacher.loss(hidden, batch), expected)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    stage_folder(tmp_path, 2, "foreign")
    tokenizer.train(["zzyy yyzz xxyy zyxw" * 50], 320, tmp_path / "foreign/tokenizer.json")
    with pytest.raises(UserError, match="does not have the student's tokenizer"):
        tune(tmp_path, Distill, teacher="foreign")


# ---- rejection sampling ------------------------------------------------------------------------------------------------


def question(number: int, right: int, chains: Sequence[str]) -> dict[str, Any]:
    good = [{"reasoning_content": chain, "content": "1"} for chain in chains]
    return {"question": str(number), "key": str(number), "right": right, "good": good, "reasons": {}}


def test_rarely_solved_questions_give_more_traces() -> None:
    found = [
        question(0, 1, ["a"]),
        question(1, 4, ["b", "c", "d", "e"]),
        question(2, 2, ["f", "g"]),
        question(3, 0, []),
    ]
    chosen = choose(found, 4, 4, 1.0, random.Random(0))
    counts = {n: sum(q["question"] == str(n) for q, _ in chosen) for n in range(4)}
    assert counts == {0: 1, 1: 1, 2: 2, 3: 0}


def test_a_chain_is_kept_once_and_easy_questions_are_limited() -> None:
    found = [question(0, 1, ["same"]), question(1, 1, ["same"]), *(question(n, 4, [f"c{n}"]) for n in range(2, 12))]
    chosen = choose(found, 4, 1, 0.5, random.Random(0))
    assert sorted(q["right"] for q, _ in chosen) == [1, 4]
    assert len(choose(found, 4, 1, 1.0, random.Random(0))) == 11
    assert choose(found[2:], 4, 1, 0.0, random.Random(0)) == []


class Echo(Chains):
    """Accepts any answer with a digit, which a random model gives now and then."""

    def check(self, problem: Any, answer: str) -> Any:
        from finback.tasks.task import Verdict

        return Verdict(correct="e" in answer, well_formed=True)


def test_reject_keeps_good_answers_resumes_and_feeds_sft(tmp_path: Path) -> None:
    stage_folder(tmp_path, 1, "base")
    stage = Reject(
        name="kept",
        start="base",
        task=Echo(2, 4),
        prompts=150,
        num_generations=3,
        max_tokens=12,
        need_chain=False,
        readable=False,
    )
    run = StageRun(tmp_path, "kept", 0, World(), quiet=True)
    run.folder.mkdir()
    results = stage.run(run)
    lines = read_lines(run.folder / "traces.jsonl")
    assert results["kept"] == len(lines) > 0 and results["sampled"] == 450
    assert sum(results["reasons"].values()) == 450
    assert all("e" in line["messages"][1]["content"] and 0 < line["solved"] <= 1 for line in lines)
    whole = (run.folder / "traces.jsonl").read_bytes()
    for path in (*run.folder.glob("part-*"), run.folder / "traces.jsonl"):
        path.unlink()
    again = StageRun(tmp_path, "kept", 0, World(), quiet=True)
    again.stop_requested = True
    with pytest.raises(Interrupted):
        stage.run(again)
    assert list(run.folder.glob("part-*")), "the first part must survive"
    again.stop_requested = False
    stage.run(again)
    assert (run.folder / "traces.jsonl").read_bytes() == whole
    again.finish({})
    assert not list(run.folder.glob("part-*")), "a finished stage must delete its parts"
    sft = SFT(name="sft", start="base", traces=("kept",), epochs=1, seq_len=64)
    tuned = StageRun(tmp_path, "sft", 0, World(), quiet=True)
    tuned.folder.mkdir()
    assert sft.run(tuned)["lessons"] == len(lines)


def test_reject_says_when_nothing_is_left(tmp_path: Path) -> None:
    stage_folder(tmp_path, 1, "base")
    stage = Reject(name="kept", start="base", task=Chains(2, 3), prompts=4, num_generations=2, max_tokens=4)
    run = StageRun(tmp_path, "kept", 0, World(), quiet=True)
    run.folder.mkdir()
    with pytest.raises(UserError, match=r"kept\.start = 'base': none of 8 answers can be kept"):
        stage.run(run)


def test_chains_are_found_where_others_write_them(tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    asked = {"role": "user", "content": "2+2?"}
    records = [
        {"messages": [asked, said], "text": "rendered", "question": "2+2?", "answer": "4"},
        {"messages": [asked, {"role": "assistant", "content": "<think>2+2</think>4"}]},
        {"question": "2+2?", "answer": "4", "reasoning_content": "2+2"},
        {"question": "2+2?", "answer": "<think>2+2</think>4"},
        {"messages": [asked, {"role": "assistant", "content": "<think> never closed", "reasoning_content": None}]},
    ]
    path = tmp_path / "chains.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    found = [d.messages[1] for d in Files((str(path),)).documents()]
    assert [(m.content, m.reasoning) for m in found[:4]] == [("4", "2+2")] * 4
    assert (found[4].content, found[4].reasoning) == ("<think> never closed", "")


def test_teachers_that_do_not_fit_are_named_and_padded_heads_are_cut(tmp_path: Path) -> None:
    stage_folder(tmp_path, 3, "short")
    small = toy_model(3)
    models.save(tmp_path / "short", type(small)(replace(small.config, max_position_embeddings=32)).initialise(0))
    with pytest.raises(UserError, match=r"tuned\.teacher = 'short': reads 32 tokens"):
        tune(tmp_path, Distill, teacher="short")
    stage_folder(tmp_path, 3, "wide")
    models.save(tmp_path / "wide", type(small)(replace(small.config, vocab_size=352)).initialise(0))
    t = tune(tmp_path, Distill, teacher="wide", top_k=5)
    assert t.loop().advance()["loss"] > 0


V31 = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[A]{{ '<think>' if thinking else '</think>' }}{% endif %}"
)


def test_a_template_that_asks_whether_to_think_is_told(words: Tokenizer) -> None:
    """DeepSeek-V3.1's template: a lesson with a chain opens it in the prompt, one without closes it there."""
    own = Tokenizer(words.path)
    own.template = Template(V31, {})
    bare, chained = lessons(TALK, own)
    assert taught(chained, own) == "one and one</think>2<｜end▁of▁sentence｜>"
    assert own.decode(chained.ids, skip_special=False).count("<think>") == 1
    assert taught(bare, own) == "well<｜end▁of▁sentence｜>"
    assert "[A]</think>well" in own.decode(bare.ids, skip_special=False)


def test_a_lesson_ends_with_what_the_model_stops_at(words: Tokenizer) -> None:
    own = Tokenizer(words.path)
    own.template = Template("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    own.eos, own.stops = -1, (7,)
    assert lessons(TALK, own)[0].ids[-1] == 7
    own.stops = ()
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        lessons(TALK, own)


def test_fewer_rows_than_ranks_want_leave_the_gradient_whole(tmp_path: Path) -> None:
    """The last step of an epoch: three rows over two ranks weigh as three rows on one, the balance loss included."""
    t = tune(tmp_path, batch_size=4, balance_alpha=1.0)
    given = lesson_batches(t)
    rows = [[given.lessons[i] for i in row] for row in given.order[0][:3]]

    def shared(*shares: list[list[Lesson]]) -> torch.Tensor:
        t.trainer.zero()
        for share in shares:
            batch = of_lessons(share, t.depths)
            t.trainer.backward(batch, LossTerms([100.0] * (1 + t.depths), 0.3, 1.0, len(share) / 3))
        return gradient(t).clone()

    torch.testing.assert_close(shared(rows[:2], rows[2:]), shared(rows), rtol=1e-4, atol=1e-6)
