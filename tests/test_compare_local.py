"""Models in files: three routes give the same tokens; time and cost add up; memory is freed."""

import dataclasses
import gc
import itertools
import json
import random
import shutil
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finback.checkpoint.export import export
from finback.comparison import local
from finback.comparison.compare import compare
from finback.comparison.contestant import Answer, Failure
from finback.comparison.endpoint import Endpoint
from finback.comparison.local import Local, digest_of
from finback.comparison.protocol import EvalRequest, SamplingProtocol, eval_requests
from finback.config import UserError
from finback.data.tokenizer import ASSISTANT, THINK, USER, Tokenizer
from finback.engine import request
from finback.engine.engine import Engine, EngineConfig
from finback.engine.open import load, open_engine
from finback.model.transformer import Transformer
from finback.stages.evaluate import Exam, questions
from finback.suites import catalogue, likelihood
from finback.suites.suite import Suite, SuiteSource
from finback.tasks.task import Problem
from tests.comparing import Reply, Sums, faking, sums
from tests.serving import served, small_tokenizer
from tests.toy import CONFIG

GREEDY = SamplingProtocol(samples=1, temperature=0.0, max_tokens=16)
DIVERSE = SamplingProtocol(samples=3, temperature=1.0, top_p=0.9, max_tokens=16, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights in Hugging Face's format, spread out so that no two answers are alike."""
    words = small_tokenizer()
    config = dataclasses.replace(CONFIG, vocab_size=words.vocab_size, initializer_range=0.3, num_nextn_predict_layers=0)
    path = tmp_path_factory.mktemp("models") / "toy"
    special = {"bos_token_id": words.bos, "eos_token_id": words.eos, "pad_token_id": words.pad}
    export(Transformer(config).initialise(4).eval(), path, "fp32", words.export, special)
    return path


def whales(n: int) -> Suite:
    """Questions of different lengths, some with special tokens that a user must not forge."""
    rng, problems = random.Random(7), []
    for i in range(n):
        text = " ".join(rng.choices(["The whale sang.", "4+5=9", "Ärger", "?", "<think>", "\n"], k=rng.randint(1, 9)))
        problems.append(Problem(f"{i}: {text}", "1", f"whale {i}"))
    return Suite("whales", tuple(problems), Sums(), SuiteSource("random words", "MIT", f"{n:064x}"))


def said(found: list[Answer | Failure]) -> dict[tuple[str, int], tuple[str, str, str, int | None, int | None]]:
    assert all(isinstance(a, Answer) for a in found), found
    return {
        (a.question, a.sample): (a.thinking, a.text, a.finish, a.prompt_tokens, a.tokens)
        for a in found
        if isinstance(a, Answer)
    }


def in_process(
    folder: Path, wanted: list[EvalRequest], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Any], dict[str, list[int]]]:
    """Answers of the built-in engine, and their tokens by question."""
    names = {ask.seed: ask.suite.problems[ask.place].key for ask in wanted}
    rows: dict[str, request.Request] = {}
    plain = Engine.submit

    def note(engine: Engine, prompt: Any, sampling: Any, seed: int, **more: Any) -> request.Request:
        rows[names[seed]] = row = plain(engine, prompt, sampling, seed, **more)
        return row

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "submit", note)
        found = list(Local(folder, "toy", "fp32").answers(wanted, GREEDY))
    return found, {name: list(row.tokens) for name, row in rows.items()}


def over_our_server(
    folder: Path, wanted: list[EvalRequest], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Any], list[list[int]]]:
    """The same from our server as an endpoint; its token lists are in arbitrary order."""
    engine, _ = open_engine(folder, "fp32", EngineConfig(8, 8192, 64, reuse=True, speculate=True))
    rows: list[request.Request] = []
    plain = engine.submit
    monkeypatch.setattr(engine, "submit", lambda *a, **k: rows.append(plain(*a, **k)) or rows[-1])
    with served(engine, name="toy") as client:
        endpoint = Endpoint(f"{str(client.base_url).rstrip('/')}/v1", "toy", concurrency=6)
        return list(endpoint.answers(wanted, GREEDY)), [row.tokens for row in rows]


def over_transformers(folder: Path, wanted: list[EvalRequest]) -> tuple[list[Any], dict[str, list[int]]]:
    """The same from transformers behind an OpenAI-style server: its own tokenizer, template, model and generate."""
    transformers = pytest.importorskip("transformers")
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stops = [words.eos_token_id, *words.convert_tokens_to_ids([USER, ASSISTANT])]
    tokens: dict[str, list[int]] = {}
    lock = threading.Lock()

    def behave(n: int, body: dict[str, Any]) -> Reply:
        text = words.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([words.encode(text, add_special_tokens=False)])
        with lock, torch.no_grad():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=body["max_tokens"],
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=words.pad_token_id,
            )[0, ids.size(1) :].tolist()
        tokens[body["messages"][-1]["content"]] = made
        finish = "stop" if made[-1] in stops else "length"
        text = words.decode(made[:-1] if finish == "stop" else made, skip_special_tokens=True)
        return _Counted(text, finish=finish, counts=(ids.size(1), len(made)), stream=False)

    with faking(behave) as fake:
        return list(Endpoint(fake.url, "toy", concurrency=2).answers(wanted, GREEDY)), tokens


@dataclasses.dataclass
class _Counted(Reply):
    counts: tuple[int, int] = (0, 0)

    def body(self) -> tuple[str, bytes]:
        kind, raw = super().body()
        prompt, made = self.counts
        return kind, raw.replace(
            b'"prompt_tokens": 7, "completion_tokens": 5',
            f'"prompt_tokens": {prompt}, "completion_tokens": {made}'.encode(),
        )


@pytest.mark.parametrize("items", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_three_routes_give_the_same_tokens(items: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = whales(items)
    # transformers' template does not distinguish special tokens from the same text by a user
    suite = dataclasses.replace(
        suite,
        problems=tuple(dataclasses.replace(p, question=p.question.replace(THINK, "think")) for p in suite.problems),
    )
    wanted = eval_requests([suite], GREEDY, {})
    ours, our_tokens = in_process(folder, wanted, monkeypatch)
    served_ones, served_tokens = over_our_server(folder, wanted, monkeypatch)
    theirs, their_tokens = over_transformers(folder, wanted)
    assert our_tokens == {p.key: their_tokens[p.question] for p in suite.problems}
    assert sorted(our_tokens.values()) == sorted(served_tokens)
    assert said(ours) == said(served_ones)
    # a stream holds back incomplete characters, so texts are compared up to the first invalid byte
    first = {key: (text.partition("\ufffd")[0], *rest) for key, (_, text, *rest) in said(ours).items()}
    assert first == {key: (text.partition("\ufffd")[0], *rest) for key, (_, text, *rest) in said(theirs).items()}
    assert len({a.text for a in ours}) > items / 2, "the answers must differ, or the comparison is empty"


def test_samples_are_the_same_every_time_in_any_company(folder: Path) -> None:
    wanted = eval_requests([whales(4)], DIVERSE, {})
    once = said(list(Local(folder, "toy", "fp32").answers(wanted, DIVERSE)))
    alone = said(list(Local(folder, "toy", "fp32", rows=1).answers(wanted[::-1], DIVERSE)))
    assert once == alone and len(set(once.values())) == len(once) == 12


def test_time_and_money_add_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))  # every step of the engine takes one second
    with monkeypatch.context() as patch:
        patch.setattr(local, "time", clock)
        wanted = eval_requests([whales(6)], DIVERSE, {})
        found = [a for a in Local(folder, "toy", "fp32", rows=4).answers(wanted, DIVERSE) if isinstance(a, Answer)]
    steps = next(ticks) / 2
    busy = sum(a.busy for a in found)
    assert len(found) == 18 and busy == pytest.approx(steps)
    assert all(a.busy > 0 and a.seconds > 0 for a in found) and len({a.busy for a in found}) > 1
    price = local.price_here(3600.0)
    assert sum(price.of(a) or 0 for a in found) == pytest.approx(busy)
    cores = local.price_here(None)
    assert cores.per_hour == pytest.approx(0.04 * torch.get_num_threads()) and "estimate" in cores.basis


def test_long_questions_fail_and_long_answers_are_cut(folder: Path) -> None:
    suite = sums(2)
    long = dataclasses.replace(suite.problems[1], question="whale " * 300)
    suite = dataclasses.replace(suite, problems=(suite.problems[0], long))
    rules = SamplingProtocol(
        samples=1, temperature=0.0, max_tokens=32768
    )  # far more than the window, as R1's budget is for a toy
    found = list(Local(folder, "toy", "fp32").answers(eval_requests([suite], rules, {}), rules))
    (failure,) = (f for f in found if isinstance(f, Failure))
    assert failure.ask.place == 1 and "window is 256" in failure.problem
    (answer,) = (f for f in found if isinstance(f, Answer))
    assert answer.prompt_tokens is not None and answer.tokens is not None
    assert answer.finish == "stop" or answer.prompt_tokens + answer.tokens == 256


@pytest.mark.parametrize("think", [True, False])
def test_thinking_is_opened_or_banned(think: bool, folder: Path) -> None:
    rules = dataclasses.replace(GREEDY, think=think)
    found = [
        a
        for a in Local(folder, "toy", "fp32").answers(eval_requests([whales(6)], rules, {}), rules)
        if isinstance(a, Answer)
    ]
    if think:  # random weights hardly ever close an open chain: there is a chain but no answer
        assert all(a.thinking and (a.closed or not a.text) for a in found) and not all(a.closed for a in found)
    else:
        assert all(a.closed and not a.thinking for a in found)


def test_stop_texts(folder: Path) -> None:
    wanted = eval_requests([whales(3)], GREEDY, {})
    plain = said(list(Local(folder, "toy", "fp32").answers(wanted, GREEDY)))
    (question, sample), (_, text, *_) = next((k, v) for k, v in plain.items() if len(v[1]) > 8)
    stop = text[4:7]
    suite = dataclasses.replace(whales(3), stop=(stop,))
    stopped = said(list(Local(folder, "toy", "fp32").answers(eval_requests([suite], GREEDY, {}), GREEDY)))
    assert stopped[question, sample][1] == text.partition(stop)[0].strip()
    assert stopped[question, sample][2] == "stop"


def test_the_model_leaves_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[Transformer]] = []
    plain = local.open_engine

    def note(*a: Any) -> tuple[Engine, Tokenizer]:
        engine, tokenizer = plain(*a)
        models.append(weakref.ref(engine.model))
        return engine, tokenizer

    monkeypatch.setattr(local, "open_engine", note)
    wanted = eval_requests([whales(2)], GREEDY, {})
    contestant = Local(folder, "toy", "fp32")
    list(contestant.answers(wanted, GREEDY))
    stream = contestant.answers(wanted, GREEDY)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    gc.collect()
    assert len(models) == 2 and all(model() is None for model in models)
    assert list(contestant.answers([], GREEDY)) == [] and len(models) == 2, "without requests no model is loaded"


def test_the_digest_follows_what_is_in_the_files(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert digest_of(copy) == digest_of(folder)
    (copy / "README.md").write_text("no part of the model")
    assert digest_of(copy) == digest_of(folder)
    for name in ("generation_config.json", "tokenizer.json", "config.json"):
        before = digest_of(copy)
        (copy / name).write_text((copy / name).read_text() + " ")
        assert digest_of(copy) != before, name


def quiz(path: Path, n: int = 12) -> Path:
    """Choices of several lengths, so that the likeliest one differs from the likeliest one per character."""
    rng = random.Random(3)
    words = ["4", "5", "whale", "the whale", "sang 4+5", "9=9", "The whale sang."]
    records = [
        {"question": f"Which of {i}?", "choices": rng.sample(words, 2 + i % 3), "answer": i % 2} for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_choices_by_their_likelihood(folder: Path, tmp_path: Path) -> None:
    """Recomputes the likeliest continuation token by token, one row at a time."""
    path, model, tokenizer = quiz(tmp_path / "quiz.jsonl"), *load(folder)
    right: dict[str, list[bool]] = {form: [] for form in likelihood.FORMS}
    for record in map(json.loads, path.read_text().splitlines()):
        letters = "ABCD"[: len(record["choices"])]
        shown = "".join(f"\n{letter}. {text}" for letter, text in zip(letters, record["choices"], strict=True))
        for form in likelihood.FORMS:
            context = (
                f"{record['question']}{shown}\nAnswer:"
                if form == "letters"
                else f"Question: {record['question']}\nAnswer:"
            )
            scores = []
            for text in letters if form == "letters" else record["choices"]:
                ids, begun = tokenizer.encode(f"{context} {text}"), len(tokenizer.encode(context))
                with torch.no_grad():
                    logp = model.logits(model(torch.tensor([ids]))).log_softmax(-1)[0]
                total = sum(logp[i - 1, ids[i]].item() for i in range(begun, len(ids)))
                scores.append(total / len(text) if form == "texts-normalized" else total)
            right[form].append(scores.index(max(scores)) == record["answer"])
    contestant = Local(folder, "toy", "fp32")
    suites = [catalogue.load(f"{path}?score={form}&shuffle=false", None, 0) for form in likelihood.FORMS]
    report = compare([contestant], suites, SamplingProtocol(samples=4), tmp_path / "out")
    assert [s["accuracy"] for s in report["scores"]] == [sum(right[form]) / 12 for form in likelihood.FORMS]
    assert len({tuple(values) for values in right.values()}) > 1 and report["scores"][0]["answers"] == 12
    with pytest.raises(UserError, match="scored by log-likelihood, which m does not return"):
        compare([Endpoint("http://127.0.0.1:9/v1", "m")], suites, SamplingProtocol(), tmp_path / "no")


def test_examples_before_a_question(tmp_path: Path) -> None:
    path = quiz(tmp_path / "quiz.jsonl")
    suite = catalogue.load(f"{path}?score=texts&shots=2&shuffle=false", None, 0)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rng = random.Random(1234)  # the harness's seed; draws are sequential
    for problem, record in zip(suite.problems, records, strict=True):
        others = [r for r in rng.sample(records, 3) if r != record][:2]
        put = [f"Question: {r['question']}\nAnswer: {r['choices'][r['answer']]}" for r in others]
        assert problem.question == "\n\n".join([*put, f"Question: {record['question']}\nAnswer:"])
    some = catalogue.load(f"{path}?score=texts&shots=2&shuffle=false", 5, 0)
    assert all(problem in suite.problems for problem in some.problems)
    for query, said in (
        ("score=words", "no such way to score"),
        ("score=texts&shots=12", "Ask for fewer"),
        ("shots=2", "`score` is missing"),
        ("score=texts&prompt=plain", "Leave out one"),
    ):
        with pytest.raises(UserError, match=said):
            catalogue.load(f"{path}?{query}", None, 0)
    with pytest.raises(UserError, match="an exam generates"):
        questions(Exam("quiz", suite=f"{path}?score=texts"), 0)
