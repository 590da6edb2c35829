"""Text completions on the wire: prompts in every form, echo, log-probabilities, fill-in-the-middle."""

from typing import Any

import httpx
import pytest

from finback.data.tokenizer import BOS, FIM
from tests.serving import Scripted, small_tokenizer, streamed

pytestmark = pytest.mark.usefixtures("nothing_is_left")

PATH = "/v1/completions"


def ask(client: httpx.Client, **request: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"seed": 1, "max_tokens": 6} | request)
    assert response.status_code == 200, response.text
    return response.json()


def test_prompts_come_in_four_forms(client: httpx.Client, engine: Scripted) -> None:
    words = small_tokenizer()
    ids = [words.bos, *words.encode("4+5=")]
    text = ask(client, prompt="4+5=")["choices"][0]["text"]
    assert engine.seen[0].prompt == ids
    for prompt in (ids, ["4+5="], [ids]):
        assert ask(client, prompt=prompt)["choices"][0]["text"] == text
    reply = ask(client, prompt=["4+5=", "The whale", "4+5="], n=2)
    assert [c["index"] for c in reply["choices"]] == list(range(6)) and reply["object"] == "text_completion"
    assert reply["choices"][0]["text"] == text == reply["choices"][4]["text"]
    assert reply["usage"]["prompt_tokens"] == 2 * len(ids) + len([words.bos, *words.encode("The whale")])


def test_a_stream_says_what_a_reply_says(client: httpx.Client) -> None:
    for extra in ({}, {"echo": True}, {"logprobs": 2}, {"echo": True, "logprobs": 2, "n": 2}):
        whole = ask(client, prompt="The whale", **extra)
        chunks = streamed(client, PATH, seed=1, max_tokens=6, prompt="The whale", **extra)
        assert chunks.pop() == "[DONE]"
        assert {c["object"] for c in chunks} == {"text_completion"}
        for choice in whole["choices"]:
            parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
            assert "".join(p["text"] for p in parts) == choice["text"]
            assert parts[-1]["finish_reason"] == choice["finish_reason"]
            tables = [p["logprobs"] for p in parts if p["logprobs"]]
            for name in choice["logprobs"] or ():
                said = [x for t in tables for x in t[name]]
                if name == "token_logprobs":
                    assert [x is None for x in said] == [x is None for x in choice["logprobs"][name]]
                elif name == "top_logprobs":
                    assert [x and list(x) for x in said] == [x and list(x) for x in choice["logprobs"][name]]
                else:
                    assert said == choice["logprobs"][name]


def test_echo_scores_the_prompt(client: httpx.Client) -> None:
    words = small_tokenizer()
    scored = ask(client, prompt="The whale sang", echo=True, logprobs=3, max_tokens=0)
    (choice,) = scored["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("The whale sang", "length")
    assert scored["usage"]["completion_tokens"] == 0
    table = choice["logprobs"]
    assert table["tokens"][0] == BOS and "".join(table["tokens"][1:]) == "The whale sang"
    assert table["token_logprobs"][0] is None and table["top_logprobs"][0] is None
    assert all(p < 0 for p in table["token_logprobs"][1:])
    for token, value, best in zip(table["tokens"], table["token_logprobs"], table["top_logprobs"], strict=True):
        assert best is None or (best[token] == value and len(best) in (3, 4))
    assert [
        choice["text"][a:].startswith(t) for a, t in zip(table["text_offset"][1:], table["tokens"][1:], strict=True)
    ]
    # the same log-probabilities when an answer follows, and when the prompt consists of token ids
    ids = [words.bos, *words.encode("The whale sang")]
    longer = ask(client, prompt=ids, echo=True, logprobs=0, max_tokens=3)["choices"][0]["logprobs"]
    n = len(ids)
    assert longer["tokens"][:n] == table["tokens"] and len(longer["tokens"]) == n + 3
    assert longer["token_logprobs"][1:n] == pytest.approx(table["token_logprobs"][1:], abs=1e-5)
    assert longer["top_logprobs"] == [None] * (n + 3)


def test_nothing_need_be_said(client: httpx.Client) -> None:
    choice = ask(client, prompt="The whale", max_tokens=0)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("", "length", None)


def test_logprobs_name_bytes_that_are_no_text(client: httpx.Client, engine: Scripted) -> None:
    engine.script = "鲸"
    table = ask(client, prompt="a", logprobs=1)["choices"][0]["logprobs"]
    assert table["tokens"][:3] == ["bytes:\\xe9", "bytes:\\xb2", "bytes:\\xb8"]
    assert len(table["tokens"]) == 4  # and eos


def test_the_middle_is_filled_in(client: httpx.Client, engine: Scripted) -> None:
    words = small_tokenizer()
    hole, begin, end = (words.ids[mark] for mark in FIM)
    ask(client, prompt="def f(", suffix="): pass")
    expected = [words.bos, begin, *words.encode("def f("), hole, *words.encode("): pass"), end]
    assert engine.seen[0].prompt == expected
    assert client.post(PATH, json={"prompt": "a", "suffix": "b", "echo": True}).status_code == 400


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [2**40]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "max_tokens": -2}, "max_tokens"),
        ({"prompt": "a", "logit_bias": {"999999": 1}}, "logit_bias"),
        ({"prompt": ["a"] * 65}, "n"),
    ],
)
def test_what_does_not_fit_is_refused(client: httpx.Client, request_: dict[str, Any], param: str) -> None:
    response = client.post(PATH, json=request_)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith(param) and error["type"] == "invalid_request_error"
    assert response.headers["x-should-retry"] == "false"
