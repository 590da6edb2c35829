"""How replies end and what servers add to them: mapped, or counted and named in the table, and billed in full."""

import json
from pathlib import Path
from typing import Any

import pytest

from finback.client import Retries
from finback.comparison import table
from finback.comparison.compare import compare
from finback.comparison.contestant import AnswerStore
from finback.comparison.endings import before_stop_token, ending
from finback.comparison.endpoint import Endpoint, billed
from finback.comparison.protocol import SamplingProtocol, eval_requests
from finback.comparison.remarks import is_another
from tests.comparing import Reply, faking, right, sums

RULES = SamplingProtocol(samples=1, max_tokens=64)


def whole(message: Any, finish: Any = "stop", **more: Any) -> Reply:
    """A reply that is not streamed."""
    body = {"model": "m", "choices": [{"index": 0, "message": message, "finish_reason": finish}], **more}
    return Reply(raw=json.dumps(body).encode(), stream=False)


def asked(make: Any, out: Path, n: int = 4) -> tuple[dict[str, Any], str]:
    """The score of an endpoint whose replies `make` builds from the correct answers, and the whole table."""
    with faking(lambda _, body: make(right(body))) as fake:
        endpoint = Endpoint(fake.url, "m", retries=Retries(2, backoff=0.01))
        report = compare([endpoint], [sums(n)], RULES, out)
    assert json.loads(json.dumps(report["scores"][0]))
    return report["scores"][0], table.render(report)


@pytest.mark.parametrize(
    ("finish", "accuracy", "cut", "remark"),
    [
        *((word, 1, 0, "") for word in ("stop", "STOP", "eos_token", "eos", "stop_sequence", "COMPLETE", "end_turn")),
        *((word, 1, 0, "") for word in ("EndTurn", "stop-sequence", "FINISH_REASON_STOP", "Stop Token", "completed")),
        *((word, 0, 1, "") for word in ("length", "max_tokens", "MAX_TOKENS", "MaxTokens", "model_length")),
        ("content_filter", 0, 0, "4 withheld by the server (content_filter)"),
        ("SAFETY", 0, 0, "4 withheld by the server (SAFETY)"),
        ("refusal", 1, 0, "4 refused (refusal)"),
        ("tool_calls", 1, 0, "4 called tools (tool_calls)"),
        ("tool_use", 1, 0, "4 called tools (tool_use)"),
        ("ran_dry", 1, 0, "4 with an unknown finish reason, judged as complete (ran_dry)"),
        ({"type": "eos"}, 1, 0, ""),
        (7, 1, 0, "4 with an unknown finish reason, judged as complete (7)"),
        (None, 1, 0, "4 without a finish reason, judged as complete"),
    ],
)
def test_finish_reasons(finish: Any, accuracy: float, cut: float, remark: str, tmp_path: Path) -> None:
    score, text = asked(lambda answer: whole({"content": answer}, finish), tmp_path)
    assert (score["accuracy"], score["cut"]) == (accuracy, cut)
    word = finish["type"] if isinstance(finish, dict) else str(finish) if finish is not None else "null"
    assert score["endings"] == {word: 4}
    assert (score["flags"] == [remark] if remark else score["flags"] == []) and remark in text


def test_an_end_without_a_name_is_a_cut_where_all_tokens_are_used(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 64}
    score, _ = asked(lambda answer: whole({"content": answer}, None, usage=usage), tmp_path)
    assert (score["cut"], score["accuracy"], score["endings"]) == (1, 0, {"length": 4})


@pytest.mark.parametrize(
    ("message", "remark"),
    [
        ({"content": None, "reasoning_content": "1, I think"}, "4 reasoning only, without an answer"),
        ({"content": "", "reasoning": "1, I think"}, "4 reasoning only, without an answer"),
        ({"content": None, "thinking": "1, I think"}, "4 reasoning only, without an answer"),
        (
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "1"}]}]},
            "4 reasoning only, without an answer",
        ),
        ({"content": "<think>1, I think</think>"}, "4 reasoning only, without an answer"),
        ({"content": "<think>1, I think"}, "4 reasoning only, without an answer"),
        ({"content": ""}, "all answers empty"),
        ({"content": "<|im_end|>"}, "all answers empty"),
        ({"content": None, "refusal": "I'm sorry."}, "4 refused (refusal)"),
        ({"content": None, "tool_calls": [{"id": "a", "function": {"name": "f"}}]}, "4 called tools (tool_calls)"),
    ],
)
def test_replies_without_an_answer(message: Any, remark: str, tmp_path: Path) -> None:
    score, text = asked(lambda _: whole(message), tmp_path)
    assert (score["accuracy"], score["unparseable"]) == (0, 1)
    assert remark in score["flags"] and remark in text


def test_some_of_all_are_counted(tmp_path: Path) -> None:
    """Of 6 replies: one empty, one with reasoning only, one with a stop token, one filtered, one by another model."""

    def make(answer: str) -> Reply:
        return {
            "1": whole({"content": " "}),
            "2": whole({"content": "", "reasoning_content": "hm"}),
            "3": whole({"content": "3<|im_end|>\n<|im_start|>user\n4"}),
            "4": whole({"content": "4"}, "RECITATION"),
            "5": whole({"content": "5"}, model="n"),
        }.get(answer, whole({"content": answer}))

    score, text = asked(make, tmp_path, 6)
    assert score["accuracy"] == pytest.approx(3 / 6)
    assert (score["empty"], score["reasoning_only"]) == (1 / 6, 1 / 6)
    assert (score["stop_tokens"], score["answered_by"]) == ({"<|im_end|>": 1}, {"m": 5, "n": 1})
    assert score["endings"] == {"stop": 5, "RECITATION": 1}
    said = (
        "1 empty; 1 reasoning only, without an answer; 1 withheld by the server (RECITATION); "
        "1 with a stop token in the text, judged up to it (<|im_end|>); 1 answered by another model than m (n)"
    )
    assert "; ".join(score["flags"]) == said and said in text.replace("\\|", "|")


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_without_choices_is_no_answer(stream: bool, tmp_path: Path) -> None:
    raw = b'data: {"choices": []}\n\ndata: [DONE]\n\n' if stream else b'{"model": "m", "choices": []}'
    empty = Reply(raw=raw, stream=stream)
    score, text = asked(lambda answer: empty if answer == "2" else whole({"content": answer}), tmp_path)
    assert (score["n"], score["failed"], score["accuracy"]) == (3, 1, 1)
    assert "1 answers failed: the score covers the rest (the reply has no choices and so no answer)" in text


def test_of_several_samples_the_first_is_read(tmp_path: Path) -> None:
    def make(answer: str) -> Reply:
        choices = [
            {"index": i, "message": {"content": text}, "finish_reason": "stop"} for i, text in enumerate((answer, "x"))
        ]
        return Reply(raw=json.dumps({"choices": choices}).encode(), stream=False)

    assert asked(make, tmp_path)[0]["accuracy"] == 1


@pytest.mark.parametrize("word", ["error", "ABORT", "cancelled", "timeout", "network_error"])
def test_a_servers_own_failure_is_a_failure(word: str, tmp_path: Path) -> None:
    score, text = asked(lambda answer: whole({"content": answer}, word), tmp_path, 2)
    assert (score["failed"], score["accuracy"]) == (2, None)
    assert ending(word) == "broken" and f"the server aborted the answer with finish_reason {word!r}" in text


@pytest.mark.parametrize(
    ("text", "said", "token"),
    [
        ("3", "3", ""),
        ("3<|im_end|>", "3", "<|im_end|>"),
        ("3 </s>", "3", "</s>"),
        ("3<|eot_id|>4", "3", "<|eot_id|>"),
        ("3<｜end▁of▁sentence｜>", "3", "<｜end▁of▁sentence｜>"),
        ("3<end_of_turn>\n", "3", "<end_of_turn>"),
        ("3<|endoftext|>Human: 5", "3", "<|endoftext|>"),
        ("<|end|>3", "3", "<|end|>"),
        ("3[/INST] 5", "3", "[/INST]"),
        ("3</s></s>", "3", "</s>"),
        ("3<｜User｜>more", "3", "<｜User｜>"),
        ("<|im_start|>assistant\n3<|im_end|>", "3", "<|im_start|>assistant"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n3", "3", "<|start_header_id|>assistant<|end_header_id|>"),
        ("<|channel|>final<|message|>3<|return|>", "3", "<|channel|>final"),
        ("3<|return|>", "3", "<|return|>"),
        ("<s>old</s> is struck through", "<s>old</s> is struck through", ""),
        ('encode("<|endoftext|>")', 'encode("<|endoftext|>")', ""),
        ("a <b> c | d > e", "a <b> c | d > e", ""),
        ("f <| x |> g", "f <| x |> g", ""),
    ],
)
def test_stop_tokens(text: str, said: str, token: str) -> None:
    assert before_stop_token(text) == (said, token)


@pytest.mark.parametrize(
    ("named", "asked_for", "other"),
    [
        ("gpt-4o-mini", "gpt-4o", True),
        ("gpt-4o-2024-08-06", "gpt-4o", False),
        ("gpt-4o", "openai/gpt-4o", False),
        ("GPT-4o", "gpt-4o", False),
        ("mistral-large-2411", "mistral-large-latest", False),
        ("x", "x:free", False),
        ("gpt-3.5-turbo-1106", "gpt-3.5-turbo-0613", True),
        ("deepseek-v3", "deepseek-r1", True),
    ],
)
def test_another_model(named: str, asked_for: str, other: bool) -> None:
    assert is_another(named, asked_for) == other


@pytest.mark.parametrize(
    ("usage", "prompt", "made"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}, 10, 5),
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 115}, 10, 105),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 5,
                "total_tokens": 115,
                "completion_tokens_details": {"reasoning_tokens": 100},
            },
            10,
            105,
        ),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 105,
                "total_tokens": 115,
                "completion_tokens_details": {"reasoning_tokens": 100},
            },
            10,
            105,
        ),
        (
            {"prompt_tokens": 10, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 100}},
            10,
            105,
        ),
        ({"prompt_tokens": 10, "total_tokens": 40}, 10, 30),
        ({"completion_tokens": 30, "total_tokens": 40}, 10, 30),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 5,
                "total_tokens": 45,
                "prompt_tokens_details": {"cached_tokens": 30},
            },
            40,
            5,
        ),
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 0}, 10, 5),
        ({"input_tokens": 10, "output_tokens": 5.0}, 10, 5),
        ({"prompt_tokens": 10, "completion_tokens": None, "total_tokens": None}, 10, None),
        ({"prompt_tokens": -1, "completion_tokens": True, "total_tokens": "9"}, None, None),
    ],
)
def test_what_is_billed(usage: dict[str, Any], prompt: int | None, made: int | None) -> None:
    assert billed(usage) == (prompt, made)


def test_the_chain_that_only_the_total_counts_is_billed(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 511}
    score, _ = asked(lambda answer: whole({"content": answer}, usage=usage), tmp_path)
    assert (score["tokens"], score["prompt_tokens"]) == (501, 10)


def test_answers_of_an_older_version_are_read(tmp_path: Path) -> None:
    ask = eval_requests([sums(1)], RULES, {})[0]
    line = {
        "key": ask.key,
        "suite": "sums",
        "question": "sums:0",
        "sample": 0,
        "thinking": "",
        "text": "1",
        "closed": True,
    }
    line |= {"finish": "eos_token", "prompt_tokens": 1, "tokens": 1, "seconds": 1.0}
    store = AnswerStore(tmp_path, "a", {})
    store.path.write_text(json.dumps(line) + "\n")
    assert AnswerStore(tmp_path, "a", {}).answers[ask.key].whole
