"""External engines with the same model: how to request tokens from each, and which one to ask."""

import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finback.client import DONE, Client, RequestFailed, parse_json
from finback.engine.pages import digest
from finback.engine.request import SamplingParams, TokenLogprobs
from finback.rollouts.generation_server import object_of
from finback.rollouts.server_kinds import SEEDS

BLOCK = 64  # granularity of prefix matching, in tokens
KNOWN = 1 << 16  # prefixes remembered per replica
MORE = 8  # how many more requests than the least busy replica one may get because of its cache
RESTS = 5.0  # pause after a failure, in seconds
LONGEST = 256 << 20  # largest answer in bytes


@dataclass(frozen=True)
class TokenPiece:
    """Tokens as they arrive, with log-probabilities and top alternatives if requested; and the finish reason."""

    tokens: list[int]
    logprobs: list[float]
    tops: list[TokenLogprobs]
    finish: str | None = None


class Replica(ABC):
    """One external engine, through its token API; there is a subclass for each program."""

    def __init__(self, url: str, name: str, key: str = "", timeout: float = 600.0) -> None:
        """name: the program's name for the model."""
        self.url, self.name = url, name
        self.client = Client(url, key, timeout, max_bytes=LONGEST)
        # running requests, and the time before which it is not asked
        self.active, self.resume = 0, 0.0
        # prefixes of prompts that it has read, the newest last
        self.read: OrderedDict[bytes, None] = OrderedDict()

    @abstractmethod
    def answer(
        self, ids: Sequence[int], sampling: SamplingParams, room: int, seed: int, salt: str
    ) -> Iterator[TokenPiece]:
        """Continues a prompt by at most `room` tokens, which follow the sampling's schema or grammar from the first one on.

        RequestFailed if it fails. Closing the iterator cancels the request.
        """


class VllmReplica(Replica):
    """vLLM's token route, streamed."""

    def answer(
        self, ids: Sequence[int], sampling: SamplingParams, room: int, seed: int, salt: str
    ) -> Iterator[TokenPiece]:
        s = sampling
        params: dict[str, Any] = {
            "max_tokens": room,
            "temperature": s.temperature,
            "top_k": s.top_k,
            "top_p": s.top_p,
            "min_p": s.min_p,
            "frequency_penalty": s.frequency_penalty,
            "presence_penalty": s.presence_penalty,
            "repetition_penalty": s.repetition_penalty,
            "seed": seed % SEEDS,
            "ignore_eos": True,  # stop conditions are checked here
            # includes the sampled token
            "logprobs": 1 + (s.top_logprobs or 0),
        }
        if s.schema is not None:
            params["structured_outputs"] = {"json": s.schema, "disable_any_whitespace": True}
        elif s.grammar is not None:
            params["structured_outputs"] = {"grammar": s.grammar}
        body = {
            "model": self.name,
            "token_ids": list(ids),
            "sampling_params": params | _bias(s),
            "reasoning_ended": True,  # apply the grammar at once, not after a chain of thought
            "cache_salt": salt,
            "stream": True,
        }
        for data in self.client.stream("/inference/v1/generate", body):
            if data == DONE:
                return
            choice = object_of(parse_json(data), "choices", 0)
            tokens = [int(token) for token in choice.get("token_ids") or ()]
            content = (choice.get("logprobs") or {}).get("content") or []
            tops = [
                [(int(t["token_id"]), float(t["logprob"])) for t in each.get("top_logprobs") or ()] for each in content
            ]
            finish = choice.get("finish_reason")
            yield TokenPiece(
                tokens, [float(each["logprob"]) for each in content], tops, None if finish is None else str(finish)
            )


class SglangReplica(Replica):
    """SGLang's /generate, whose stream repeats earlier output."""

    def answer(
        self, ids: Sequence[int], sampling: SamplingParams, room: int, seed: int, salt: str
    ) -> Iterator[TokenPiece]:
        s = sampling
        params: dict[str, Any] = {
            "max_new_tokens": room,
            "temperature": s.temperature,
            "top_k": s.top_k or -1,
            "top_p": s.top_p,
            "min_p": s.min_p,
            "frequency_penalty": s.frequency_penalty,
            "presence_penalty": s.presence_penalty,
            "repetition_penalty": s.repetition_penalty,
            "sampling_seed": seed % SEEDS,
            "ignore_eos": True,
            "skip_special_tokens": False,
        }
        if s.schema is not None:
            params["json_schema"] = s.schema
        elif s.grammar is not None:
            params["ebnf"] = s.grammar
        body = {
            "input_ids": list(ids),
            "sampling_params": params | _bias(s),
            "return_logprob": True,
            "return_routed_experts": False,
            "logprob_start_len": -1,
            "top_logprobs_num": s.top_logprobs or 0,
            "cache_salt": salt,
            "stream": True,
        }
        had = 0
        for data in self.client.stream("/generate", body):
            if data == DONE:
                return
            meta = object_of(parse_json(data), "meta_info")
            drawn = (meta.get("output_token_logprobs") or [])[had:]
            likeliest = (meta.get("output_top_logprobs") or [])[had:]
            had += len(drawn)
            finish = meta.get("finish_reason")
            kind = finish.get("type") if isinstance(finish, dict) else finish
            tops = [[(int(token), float(value)) for value, token, *_ in line or ()] for line in likeliest]
            yield TokenPiece([int(t) for _, t, *_ in drawn], [float(p) for p, *_ in drawn], tops, kind)


def _bias(sampling: SamplingParams) -> dict[str, Any]:
    """The logit biases, clamped to -100..100, the range of both programs."""
    bias = {str(token): max(-100.0, min(100.0, value)) for token, value in sampling.logit_bias}
    return {"logit_bias": bias} if bias else {}


KINDS: dict[str, type[Replica]] = {"vllm": VllmReplica, "sglang": SglangReplica}


class ReplicaRouter:
    """Sends a prompt to the replica that has read most of it already, unless that one is much busier than another."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = list(replicas)
        self._lock = threading.Lock()

    def take(self, ids: Sequence[int], salt: bytes) -> Replica:
        """The replica for a prompt, with its request count increased; `salt` separates prompts that share no cache."""
        names: list[bytes] = []
        for end in range(BLOCK, len(ids) + 1, BLOCK):
            names.append(digest(names[-1] if names else salt[:64], ids[end - BLOCK : end]))
        with self._lock:
            now = time.monotonic()
            able = [each for each in self.replicas if each.resume <= now] or self.replicas
            least = min(each.active for each in able)
            able = [each for each in able if each.active <= least + MORE]
            best = max(able, key=lambda each: (_known(each, names), -each.active))
            best.active += 1
            for name in names:
                best.read[name] = None
                best.read.move_to_end(name)
            while len(best.read) > KNOWN:
                best.read.popitem(last=False)
        return best

    def give_back(self, replica: Replica, error: RequestFailed | None = None) -> None:
        """Reports that a request has ended, and how."""
        with self._lock:
            replica.active -= 1
            if error is not None and not error.final:
                replica.resume = time.monotonic() + RESTS
                replica.read.clear()  # it may have been restarted


def _known(replica: Replica, names: Sequence[bytes]) -> int:
    """Number of leading blocks of a prompt that a replica has read."""
    for count, name in enumerate(names):
        if name not in replica.read:
            return count
    return len(names)
