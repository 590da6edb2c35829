"""Token ids in and out, and a change of weights in a running server: the routes that a trainer needs."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from finback.checkpoint import models
from finback.checkpoint.export import export
from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import SamplingParams
from finback.model.transformer import Transformer
from tests.serving import served, small_model, small_tokenizer
from tests.toy import CONFIG, toy_model

PROMPT = list(range(40, 90))
GENERATE, UPDATE = "/inference/v1/generate", "/update_weights_from_disk"


def engine_on(model: Transformer) -> Engine:
    words = small_tokenizer()
    config = EngineConfig(8, 4096, 64, reuse=True, speculate=True, return_routed_experts=True)
    return Engine(model, words.stops, config, words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder from which the server may load weights."""
    return tmp_path_factory.mktemp("weights")


@pytest.fixture
def tokens_client(folder: Path) -> Iterator[httpx.Client]:
    with served(engine_on(small_model(512)), allow_weight_updates=folder) as client:
        yield client


def asked(client: httpx.Client, seed: int = 3, **params: Any) -> Any:
    """The one choice of an answer to PROMPT."""
    wanted = {"max_tokens": 12, "seed": seed, "temperature": 0.8, "logprobs": 1, "ignore_eos": True} | params
    reply = client.post(GENERATE, json={"token_ids": PROMPT, "sampling_params": wanted})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def logprobs(choice: Any) -> list[float]:
    return [each["logprob"] for each in choice["logprobs"]["content"]]


def directly(model: Transformer, seed: int = 3, **params: Any) -> Any:
    """The same answer from a separate engine."""
    sampling = SamplingParams(**{"temperature": 0.8, "max_tokens": 12, "ignore_eos": True} | params)
    return Engine(model, small_tokenizer().stops).generate([PROMPT], sampling, [seed])[0]


def test_answers_are_the_engines(tokens_client: httpx.Client) -> None:
    expected = directly(small_model(512))
    for found in (asked(tokens_client), asked(tokens_client)):  # the second finds the prompt in the cache
        assert found["token_ids"] == expected.tokens and found["finish_reason"] == expected.finish_reason
        assert logprobs(found) == pytest.approx(expected.logprobs, abs=1e-5)
        assert [each["token_id"] for each in found["logprobs"]["content"]] == expected.tokens
        assert found["weight_versions"] == [{"version": "default", "start": 0, "end": 12}]
        experts = np.load(io.BytesIO(base64.b64decode(found["routed_experts"])))
        assert experts.shape == (len(PROMPT) + 11, 2, CONFIG.num_experts_per_tok) and experts[:, 1].any()
    stop = expected.tokens[4]
    stopped = asked(tokens_client, stop_token_ids=[stop])
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)
    assert stopped["token_ids"] == expected.tokens[: expected.tokens.index(stop) + 1]


def test_log_probabilities_count_among_what_top_k_leaves(tokens_client: httpx.Client) -> None:
    expected = directly(small_model(512), top_k=5, return_sampling_mask=True)
    found = asked(tokens_client, top_k=5)
    assert found["token_ids"] == expected.tokens and logprobs(found) == pytest.approx(expected.logprobs, abs=1e-5)
    assert expected.sampling_mask is not None
    assert found["sampling_mask"] == [ids.tolist() for ids in expected.sampling_mask]
    assert asked(tokens_client)["sampling_mask"] is None


def test_other_weights_answer_under_their_version(tokens_client: httpx.Client, folder: Path) -> None:
    """Weights in finback's own format and from an export; cached prompts are read again."""
    before = asked(tokens_client)
    other = Transformer(small_model(512).config).initialise(5).eval()
    (folder / "own").mkdir()
    models.save(folder / "own", other)
    export(other, folder / "exported", "fp32")
    for name, version in (("own", "17"), ("exported", None)):
        reply = tokens_client.post(UPDATE, json={"model_path": str(folder / name), "weight_version": version})
        assert reply.status_code == 200 and reply.json()["weight_version"] == (version or name)
        found, expected = asked(tokens_client), directly(other)
        assert found["token_ids"] == expected.tokens != before["token_ids"]
        assert logprobs(found) == pytest.approx(expected.logprobs, abs=1e-5)
        assert found["weight_versions"] == [{"version": version or name, "start": 0, "end": 12}]
    chat = tokens_client.post(
        "/v1/completions", json={"prompt": PROMPT, "max_tokens": 4, "seed": 3, "temperature": 0.8}
    )
    assert chat.status_code == 200 and chat.json()["usage"]["completion_tokens"] == 4


def test_weights_that_do_not_fit_change_nothing(tokens_client: httpx.Client, folder: Path) -> None:
    before = asked(tokens_client)
    (folder / "toy").mkdir()
    models.save(folder / "toy", toy_model())  # another window
    cases = {
        "its shape or precision differs": folder / "toy",
        "holds no model": folder,
        "no such file or folder": folder / "nowhere",
        "not inside": folder.parent,
    }
    for problem, path in cases.items():
        refused = tokens_client.post(UPDATE, json={"model_path": str(path), "weight_version": "1"})
        assert refused.status_code == 400 and problem in refused.json()["error"]["message"], refused.text
        assert refused.json()["error"]["param"] == "model_path"
    after = asked(tokens_client)
    assert (after["token_ids"], after["weight_versions"]) == (before["token_ids"], before["weight_versions"])


def test_weights_stay_unless_the_server_was_started_for_it(client: httpx.Client, folder: Path) -> None:
    refused = client.post(UPDATE, json={"model_path": str(folder), "weight_version": "1"})
    assert refused.status_code == 403 and "--allow-weight-updates" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [1, 10**6]}, "prompt"),
        ({"token_ids": [1] * 5000}, "max_tokens"),
        ({"stream": True}, "stream"),
        ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"sampling_params": {"logprobs": 5}}, "sampling_params.logprobs"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], param: str, client: httpx.Client) -> None:
    reply = client.post(GENERATE, json={"token_ids": PROMPT, "sampling_params": {"max_tokens": 4}} | change)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text


def test_a_text_has_the_ids_that_training_gives_it(client: httpx.Client) -> None:
    text = "The whale sang <think> 4+5=9 鯨"
    reply = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert reply["tokens"] == small_tokenizer().encode(text) and reply["count"] == len(reply["tokens"])
