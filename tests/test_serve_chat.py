"""Chat completions on the wire: the envelope, choices, sampling, log-probabilities, usage."""

import threading
from typing import Any

import httpx
import pytest

from finback.serve.http import digests
from tests.serving import CHAT, HELLO, KEY, OTHER, Scripted, served, small_tokenizer, streamed, summed

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def ask(client: httpx.Client, **request: Any) -> dict[str, Any]:
    response = client.post(CHAT, json=HELLO | request)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_reply_has_openais_envelope(client: httpx.Client) -> None:
    reply = ask(client, model="toy")
    assert reply["object"] == "chat.completion" and reply["model"] == "toy" and reply["id"].startswith("chatcmpl-")
    (choice,) = reply["choices"]
    assert choice["index"] == 0 and choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_cache_hit_tokens"]
    timings = reply["timings"]
    assert timings["predicted_n"] == usage["completion_tokens"] and timings["prompt_ms"] > 0
    assert timings["prompt_n"] + timings["cache_n"] == usage["prompt_tokens"]


def test_a_stream_says_what_a_reply_says(client: httpx.Client) -> None:
    for extra in ({}, {"temperature": 0}, {"thinking": {"type": "enabled"}}, {"logprobs": True, "top_logprobs": 3}):
        whole = ask(client, **extra)["choices"][0]
        message = summed(streamed(client, **HELLO | extra))
        assert {**whole["message"], "finish_reason": whole["finish_reason"]} == message


def test_a_streams_chunks_share_one_envelope(client: httpx.Client) -> None:
    chunks = streamed(client, **HELLO)
    assert chunks.pop() == "[DONE]"
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
    assert all(len(c["choices"]) == 1 and "usage" not in c for c in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in c["choices"][0]["delta"] for c in chunks[1:])
    reasons = [c["choices"][0]["finish_reason"] for c in chunks]
    assert reasons[-1] in ("stop", "length") and set(reasons[:-1]) == {None}
    assert "timings" in chunks[-1] and not any("timings" in c for c in chunks[:-1])


def test_usage_comes_in_a_chunk_of_its_own_if_asked_for(client: httpx.Client) -> None:
    *chunks, last, done = streamed(client, **HELLO, stream_options={"include_usage": True})
    assert done == "[DONE]" and last["choices"] == [] and all(c["usage"] is None for c in chunks)
    assert last["usage"] == ask(client)["usage"] | {
        n: last["usage"][n] for n in ("prompt_cache_hit_tokens", "prompt_cache_miss_tokens", "prompt_tokens_details")
    }


def test_several_choices_are_those_of_single_requests(client: httpx.Client, engine: Scripted) -> None:
    several = ask(client, n=3, max_tokens=12, messages=[{"role": "user", "content": "Sing " * 20}])
    prompts = {len(s.prompt) for s in engine.seen}
    assert several["usage"]["prompt_tokens"] == prompts.pop() and not prompts
    assert [s.leader for s in engine.seen] == [None, engine.seen[0], engine.seen[0]]
    assert all(s.cached > 0 for s in engine.seen[1:])  # the prompt was read once
    for i, choice in enumerate(several["choices"]):
        alone = ask(client, seed=1 + i, max_tokens=12, messages=[{"role": "user", "content": "Sing " * 20}])
        assert choice["index"] == i and choice["message"] == alone["choices"][0]["message"]
    chunks = streamed(client, **HELLO, n=3)
    assert [summed(chunks, i)["role"] for i in range(3)] == ["assistant"] * 3
    assert len({summed(chunks, i)["content"] for i in range(3)}) > 1


def test_the_same_seed_says_the_same(client: httpx.Client) -> None:
    texts = [ask(client, seed=s, max_tokens=16)["choices"][0]["message"]["content"] for s in (5, 5, -5, 2**80, 6)]
    assert texts[0] == texts[1] and len(set(texts)) > 1


def test_stop_texts_end_the_answer(client: httpx.Client, engine: Scripted) -> None:
    engine.script = "one, two, three"
    for stop, text in ((" two", "one,"), (["three", "two"], "one, "), ([], "one, two, three")):
        choice = ask(client, stop=stop, max_tokens=64)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        assert summed(streamed(client, **HELLO | {"stop": stop, "max_tokens": 64}))["content"] == text


def test_logprobs_have_openais_shape(client: httpx.Client, engine: Scripted) -> None:
    engine.script = "<think>4+5=9</think>鲸"
    choice = ask(client, logprobs=True, top_logprobs=2, max_tokens=64)["choices"][0]
    chain, said = choice["logprobs"]["reasoning_content"], choice["logprobs"]["content"]
    assert "".join(e["token"] for e in chain) == "<think>4+5=9</think>"
    assert bytes(b for e in said[:-1] for b in e["bytes"]).decode() == "鲸"  # the last token is eos
    for entry in chain + said:
        assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]
    chunks = streamed(client, **HELLO | {"logprobs": True, "max_tokens": 64})[:-1]
    told = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    tokens = [e["token"] for t in told for e in (t["reasoning_content"] or []) + (t["content"] or [])]
    assert tokens == [e["token"] for e in chain + said]
    assert ask(client)["choices"][0]["logprobs"] is None


def test_sampling_fields_reach_the_engine(client: httpx.Client, engine: Scripted) -> None:
    ask(
        client,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.01,
        frequency_penalty=0.3,
        presence_penalty=-0.2,
        repetition_penalty=1.1,
        logit_bias={"5": -100},
        stop_token_ids=[9],
        ignore_eos=True,
        user="me",
        max_completion_tokens=5,
        max_tokens=9,
        nonsense={"is": "ignored"},
    )
    s = engine.seen[0].sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty) == (0.5, 0.9, 7, 0.01, 1.1)
    assert (s.frequency_penalty, s.presence_penalty, s.logit_bias) == (0.3, -0.2, ((5, -100.0),))
    assert (s.stop_token_ids, s.ignore_eos, s.max_tokens) == ((9,), True, 5)


def test_the_answer_may_fill_the_window(client: httpx.Client, engine: Scripted) -> None:
    engine.script = "short"
    ask(client, max_tokens=None)
    request = engine.seen[0]
    assert len(request.prompt) + request.sampling.max_tokens == 2048


def test_an_answer_can_be_begun_for_the_model(client: httpx.Client, engine: Scripted) -> None:
    engine.script = " nine"
    messages = [{"role": "user", "content": "4+5?"}, {"role": "assistant", "content": "It is", "prefix": True}]
    assert ask(client, messages=messages)["choices"][0]["message"]["content"].strip() == "nine"
    words = small_tokenizer()
    assert words.decode(engine.seen[0].prompt).endswith("It is")


def test_a_silent_stream_is_kept_alive() -> None:
    slow = Scripted("a b", pace=0.25)
    with served(slow, keep_alive=0.02) as client:
        chunks = streamed(client, **HELLO)
        assert chunks.count(": keep-alive") >= 2 and chunks[-1] == "[DONE]"


def test_keys_and_users_do_not_share_a_cache() -> None:
    engine = Scripted("yes")
    long = {"messages": [{"role": "user", "content": "Sing " * 60}], "max_tokens": 4}
    with served(engine, keys=digests([KEY, OTHER])) as client:

        def cached(key: str, **more: str) -> int:
            reply = client.post(CHAT, json=long | more, headers={"authorization": f"Bearer {key}"}).json()
            return reply["usage"]["prompt_cache_hit_tokens"]

        assert cached(KEY) == 0 and cached(KEY) > 0
        assert cached(OTHER) == 0 and cached(OTHER) > 0
        assert cached(KEY, user_id="one") == 0 and cached(KEY, user_id="two") == 0 and cached(KEY, user_id="one") > 0


def test_many_streams_at_once(client: httpx.Client, engine: Scripted) -> None:
    found: dict[int, Any] = {}

    def one(seed: int) -> None:
        with httpx.Client(base_url=client.base_url, timeout=60, trust_env=False) as own:
            found[seed] = summed(streamed(own, **HELLO | {"seed": seed}))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for seed in (0, 19):
        assert found[seed]["content"] == ask(client, seed=seed)["choices"][0]["message"]["content"]
