"""vLLM, SGLang and finback as servers that generate for a trainer: requests, replies and weight updates.

Formats of vLLM 0.32 and SGLang 0.5.23. Does not import torch.
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finback.client import Client, RequestFailed
from finback.rollouts.generation_server import (
    GenerationServer,
    Likeliest,
    ServedModel,
    TokenAnswer,
    TokenPrompt,
    object_of,
)
from finback.runs import npy

SEEDS = 1 << 31  # range of SGLang's seeds


class VllmServer(GenerationServer):
    """vLLM: its token route, or completions if that is off; its workers reload weights from files (`reload_method`)."""

    kind = "vLLM"
    reload_method = "reload_weights"
    without_logprobs = "Start it with --logprobs-mode processed_logprobs."
    without_masks = "Start it with --return-sampling-mask and --enable-scale-out, or leave out top_k and top_p."
    _tokens_route = True

    def _answer(self, prompt: TokenPrompt) -> TokenAnswer:
        if self._tokens_route:
            try:
                return self._of_tokens(prompt)
            except RequestFailed as error:
                if not (error.final and str(error).startswith(("HTTP 403", "HTTP 404"))):
                    raise
                self._tokens_route = False
        return self._of_completions(prompt)

    def _params(self, prompt: TokenPrompt) -> dict[str, Any]:
        return {
            "max_tokens": prompt.max_tokens,
            "temperature": prompt.temperature,
            "top_k": prompt.top_k,
            "top_p": prompt.top_p,
            "seed": prompt.seed,
            "stop_token_ids": list(prompt.stop_token_ids),
            # the model's own end of sequence is in stop_token_ids, and nothing else may end an answer
            "ignore_eos": True,
            "logprobs": 1,
        }

    def _of_tokens(self, prompt: TokenPrompt) -> TokenAnswer:
        """POST /inference/v1/generate."""
        body = {
            "model": self.name,
            "token_ids": list(prompt.token_ids),
            "sampling_params": self._params(prompt),
            "cache_salt": prompt.cache_salt,
        }
        choice = object_of(self.client.reply("/inference/v1/generate", body), "choices", 0)
        content = (choice.get("logprobs") or {}).get("content") or []
        mask, spans = choice.get("sampling_mask"), choice.get("weight_versions")
        return TokenAnswer(
            list(object_of(choice, "token_ids") or []),
            [float(each["logprob"]) for each in content],
            str(choice.get("finish_reason")),
            _routes(choice),
            None if mask is None else [np.array(ids, dtype=np.int32) for ids in mask],
            None if spans is None else [(str(s["version"]), int(s["start"]), int(s["end"])) for s in spans],
        )

    def _of_completions(self, prompt: TokenPrompt) -> TokenAnswer:
        """POST /v1/completions, which reports neither masks nor versions."""
        body = {
            "model": self.name,
            "prompt": list(prompt.token_ids),
            "return_token_ids": True,
            "cache_salt": prompt.cache_salt,
            **self._params(prompt),
        }
        choice = object_of(self.client.reply("/v1/completions", body), "choices", 0)
        if not isinstance(choice.get("token_ids"), list):
            raise self.unfit("its completions have no token ids", "Start it with --enable-scale-out.")
        given = (choice.get("logprobs") or {}).get("token_logprobs") or []
        logprobs = [float("nan") if value is None else float(value) for value in given]
        experts = _routes(choice)
        return TokenAnswer(choice["token_ids"], logprobs, str(choice.get("finish_reason")), experts)

    def _likeliest(self, token_ids: Sequence[int], k: int) -> list[Likeliest]:
        body = {"model": self.name, "prompt": list(token_ids), "max_tokens": 1, "prompt_logprobs": k}
        choice = object_of(self.client.reply("/v1/completions", body), "choices", 0)
        places = choice.get("prompt_logprobs") or []
        return [[(int(token), float(said["logprob"])) for token, said in (p or {}).items()] for p in places[1:]]

    def load(self, weights: Path, version: str) -> None:
        try:
            self.client.reply(f"/pause?mode={'abort' if self.drops else 'keep'}&clear_cache=false", {})
        except RequestFailed as error:
            if not error.final:
                raise
            remedy = "Start it with VLLM_SERVER_DEV_MODE=1, on a network that nobody else can reach."
            raise self.unfit(f"does not accept weights ({error})", remedy) from None
        try:
            with self._woken():
                # kwargs are passed as text
                body = {"method": self.reload_method, "kwargs": {"weights_path": str(weights)}}
                self.client.reply("/collective_rpc", body)
            self.client.reply("/update_weight_version", {"new_version": version})
            self.client.reply("/reset_prefix_cache", {})
        finally:
            self.client.reply("/resume", {})

    def _sleep(self) -> None:
        self.client.reply("/sleep?level=2", {})  # level 2 discards the weights; new ones arrive before the next request

    def _wake(self, tag: str) -> None:
        self.client.reply(f"/wake_up?tags={tag}", {})

    def version(self) -> str | None:
        try:
            return str(object_of(self.client.reply("/weight_info"), "weight_version"))
        except RequestFailed as error:
            if error.final:
                return None
            raise


class DiskUpdates(GenerationServer):
    """Loads weights with POST /update_weights_from_disk."""

    def load(self, weights: Path, version: str) -> None:
        body: dict[str, Any] = {"model_path": str(weights), "weight_version": version, "flush_cache": True}
        if self.drops:
            body["abort_all_requests"] = True
        with self._woken():
            try:
                reply = self.client.reply("/update_weights_from_disk", body)
            except RequestFailed as error:
                if not error.final:
                    raise
                raise self.unfit(f"does not accept weights ({error})", self.refusing) from None
            if object_of(reply, "success") is not True:
                raise RequestFailed(f"the weights were not loaded: {str(reply.get('message'))[:200]}")

    refusing = "Check its message; it must see the folder under the same path."


class FinbackServer(DiskUpdates, VllmServer):
    """finback's own server: vLLM's token route, and SGLang's way of loading weights."""

    kind = "finback"
    refusing = "Start it with --allow-weight-updates FOLDER, which must contain this run's folder of weights."


class SglangServer(DiskUpdates):
    """SGLang's /generate."""

    kind = "SGLang"
    without_logprobs = "Use a version whose /generate has return_logprob."

    def _answer(self, prompt: TokenPrompt) -> TokenAnswer:
        if self.model.return_sampling_mask:
            raise self.unfit("its log-probabilities are not renormalized after top_k and top_p", self.without_masks)
        params = {
            "max_new_tokens": prompt.max_tokens,
            "temperature": prompt.temperature,
            "top_k": prompt.top_k or -1,
            "top_p": prompt.top_p,
            "sampling_seed": prompt.seed % SEEDS,
            "stop_token_ids": list(prompt.stop_token_ids),
            "ignore_eos": prompt.ignore_eos,
            "skip_special_tokens": False,
        }
        body = {
            "input_ids": list(prompt.token_ids),
            "sampling_params": params,
            "return_logprob": True,
            "logprob_start_len": -1,
            "return_routed_experts": self.model.return_routed_experts,
            "cache_salt": prompt.cache_salt,
        }
        meta = object_of(self.client.reply("/generate", body), "meta_info")
        drawn = meta.get("output_token_logprobs")
        if not isinstance(drawn, list):
            raise self.unfit("its answers lack log-probabilities", self.without_logprobs)
        tokens = [int(token) for _, token, *_ in drawn]
        finish = meta.get("finish_reason")
        spans = meta.get("weight_versions")
        whole = None if meta.get("weight_version") is None else [(str(meta["weight_version"]), 0, len(tokens))]
        return TokenAnswer(
            tokens,
            [float("nan") if logprob is None else float(logprob) for logprob, *_ in drawn],
            str(finish.get("type") if isinstance(finish, dict) else finish),
            self._experts(meta.get("routed_experts"), len(prompt.token_ids) + len(tokens) - 1),
            None,
            [(str(s["version"]), int(s["start"]), int(s["end"])) for s in spans] if spans else whole,
        )

    def _likeliest(self, token_ids: Sequence[int], k: int) -> list[Likeliest]:
        body = {
            "input_ids": list(token_ids),
            "sampling_params": {"max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": k,
        }
        meta = object_of(self.client.reply("/generate", body), "meta_info")
        places = meta.get("input_top_logprobs") or []
        return [[(int(token), float(value)) for value, token, *_ in place or ()] for place in places[1:]]

    def _sleep(self) -> None:
        self.client.reply("/release_memory_occupation", {"tags": ["kv_cache", "weights"]})

    def _wake(self, tag: str) -> None:
        self.client.reply("/resume_memory_occupation", {"tags": [tag]})

    def _experts(self, given: str | None, rows: int) -> np.ndarray | None:
        """int32 without a header; the shape follows from the model."""
        if given is None:
            return None
        found = np.frombuffer(base64.b64decode(given), dtype=np.int32)
        wanted = rows, self.model.layers, self.model.experts_per_token
        if found.size != rows * self.model.layers * self.model.experts_per_token:
            raise self.unfit(f"{found.size} routed experts, not {wanted}", "Serve the model that is trained.")
        return found.reshape(wanted).astype(np.uint16)


KINDS: dict[str, type[GenerationServer]] = {"vllm": VllmServer, "sglang": SglangServer, "finback": FinbackServer}


def find_server(url: str, client: Client, field: str, model: ServedModel) -> GenerationServer:
    """The server at an address, identified by its replies; UserError if finback does not know the program."""
    cards = object_of(client.reply("/v1/models"), "data")
    owner, name = (str(object_of(cards, 0, key)) for key in ("owned_by", "id"))
    kind = KINDS.get(owner.lower())
    server = (kind or VllmServer)(url, client, name, field, model)
    if kind is None:
        server.kind = repr(owner)
        raise server.unfit("not a known program", "Serve with vLLM, SGLang or `finback serve`.")
    return server


def _routes(choice: dict[str, Any]) -> np.ndarray | None:
    """The routed experts of a choice, if it has them."""
    given = choice.get("routed_experts")
    return None if given is None else npy.from_text(given)
