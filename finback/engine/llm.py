"""The Python interface for generation: `finback.LLM("runs/tiny").chat("8-3+5+4-6=?")`."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finback.checkpoint.inference import InferenceDtype
from finback.config import UserError
from finback.data.messages import Response, encode_prompt, parse_response
from finback.data.openai_messages import read_messages
from finback.data.prompt_forms import knows_developer
from finback.data.tokenizer import THINK
from finback.engine.engine import EngineConfig
from finback.engine.open import ANSWERING, open_engine
from finback.engine.request import FinishReason, Request, SamplingParams
from finback.engine.sampler import without_thinking

Messages = str | Sequence[Mapping[str, Any]]  # a user's question, or a dialogue in OpenAI's format
Prompts = str | Sequence[str] | Sequence[Sequence[int]]  # a text, several texts, or lists of token ids
ADVISED = ("temperature", "top_p", "top_k", "min_p")  # what generation_config.json may recommend
LONGEST = 1024  # default limit of an answer in tokens


@dataclass(frozen=True)
class Output:
    """One answer; `str` gives its text. `reasoning` is the chain of thought, without its marks."""

    text: str
    reasoning: str
    # all token ids, including the final end-of-sequence token
    tokens: list[int]
    # log-probability of each token at its sampling temperature
    logprobs: list[float]
    finish_reason: FinishReason

    def __str__(self) -> str:
        return self.text


class LLM:
    """A model (a run, a stage, a Hugging Face folder or a GGUF file) with an engine.

    The same seed gives the same answers. Default sampling parameters are those that the model's makers recommend, with at most
    1024 tokens per answer. `adapters` maps names to folders; each answer may use one of them.
    """

    def __init__(
        self,
        model: str | Path,
        dtype: InferenceDtype = "auto",
        config: EngineConfig = ANSWERING,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> None:
        folders = {name: Path(folder) for name, folder in (adapters or {}).items()}
        self.engine, self.tokenizer = open_engine(model, dtype, config, folders)
        self.window = self.engine.capacity

    def defaults(self, **chosen: Any) -> SamplingParams:
        """SamplingParams from `chosen` where not None, else from generation_config.json, else temperature 0.7."""
        known = self.tokenizer.generation
        values = {"temperature": 0.7} | {n: known[n] for n in ADVISED if known.get(n) is not None}
        return SamplingParams(**values | {n: v for n, v in chosen.items() if v is not None})

    def generate(
        self, prompts: Prompts, sampling_params: SamplingParams | None = None, seed: int = 0, adapter: str = ""
    ) -> list[Output]:
        """Continues each prompt (text or token ids) as it is; prompt i uses random numbers of seed + i."""
        is_one = isinstance(prompts, str) or not isinstance(prompts, Iterable)
        ids = [self._ids(prompt) for prompt in ([prompts] if is_one else prompts)]
        params = sampling_params or self._fitting(max(map(len, ids), default=0))
        done = self.engine.finished(ids, params, [seed + i for i in range(len(ids))], adapter=adapter)
        return [_output(request, Response("", request.text, thinks=False, closed=True)) for request in done]

    def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        think: bool | None = None,
        seed: int = 0,
        adapter: str = "",
    ) -> Output:
        """Answers a question or the last message of a dialogue.

        `think`: True opens the chain of thought, False prevents one, None leaves it to the model.
        """
        ids, opened, params = self._prompt(messages, sampling_params, think)
        (request,) = self.engine.finished([ids], params, [seed], [opened], adapter)
        return _output(request, parse_response(THINK + request.text if opened else request.text))

    def stream(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        think: bool | None = None,
        seed: int = 0,
        adapter: str = "",
    ) -> Iterator[str]:
        """Yields the answer of `chat` in pieces as they are generated, with the chain of thought between <think> and </think>."""
        ids, opened, params = self._prompt(messages, sampling_params, think)
        if opened:
            yield THINK
        sent = 0
        for request in self.engine.stream(ids, params, seed, opened, adapter):
            assert request.detokenizer is not None, "the engine has a tokenizer"
            new = request.detokenizer.pieces[sent:]
            sent += len(new)
            yield from new

    def encode(self, messages: Messages, think: bool | None = None) -> tuple[list[int], bool]:
        """The prompt's token ids, and whether they end inside the chain of thought."""
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        read = read_messages(turns, knows_developer(self.tokenizer))
        return encode_prompt(read, self.tokenizer, think=think)

    def _prompt(
        self, messages: Messages, params: SamplingParams | None, think: bool | None
    ) -> tuple[list[int], bool, SamplingParams]:
        """As `encode`, with the sampling parameters to use."""
        ids, opened = self.encode(messages, think)
        params = params or self._fitting(len(ids))
        return ids, opened, without_thinking(params, self.tokenizer) if think is False else params

    def _ids(self, prompt: Any) -> list[int]:
        """Token ids of a prompt; UserError if it is neither text nor ids."""
        if isinstance(prompt, str):
            return [*([self.tokenizer.bos] if self.tokenizer.adds_bos else []), *self.tokenizer.encode(prompt)]
        try:
            return [operator.index(token) for token in prompt]
        except TypeError:
            remedy = "Give a list of texts, or of lists of ids."
            raise UserError("prompts", prompt, "neither a text nor a list of token ids", remedy) from None

    def _fitting(self, prompt: int) -> SamplingParams:
        return self.defaults(max_tokens=max(1, min(LONGEST, self.window - prompt)))


def _output(request: Request, response: Response) -> Output:
    made = request.completion()
    return Output(response.answer, response.reasoning, made.tokens, made.logprobs, made.finish_reason)
