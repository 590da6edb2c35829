"""From a validated request to the engine's input: prompts as token ids, and sampling params."""

import json
from dataclasses import dataclass, field
from typing import Any

from finback.config import UserError
from finback.data.messages import encode_prompt
from finback.data.openai_messages import read_messages, read_tools
from finback.data.tokenizer import FIM, THINK, Tokenizer
from finback.engine.request import SamplingParams
from finback.engine.sampler import without_thinking
from finback.serve.chat_output import Parser
from finback.serve.errors import ApiError, bad
from finback.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest
from finback.serve.tool_choice import ToolChoiceGrammar, tool_choice_grammar
from finback.serve.worker import ChoiceInput

# DeepSeek's and OpenAI's efforts as the share of max_tokens that the chain may take; None: all of it
EFFORT = {"minimal": 1 / 8, "low": 1 / 8, "medium": 1 / 4, "high": 1 / 2, "xhigh": 1 / 2, "max": None, "ultra": None}
DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # of generation_config.json
CHOSEN = (*DEFAULTS, "frequency_penalty", "presence_penalty")
SEEDS = 1 << 63


@dataclass(frozen=True)
class PreparedRequest:
    """One request, ready for the engine, and what its response has to show."""

    choices: list[ChoiceInput]
    # the prompt ends inside a chain of thought
    is_thinking: bool = False
    # the output may contain tool calls
    tools: bool = False
    # of which only the first counts
    single_call: bool = False
    # the output must be tool calls
    tool_choice: ToolChoiceGrammar | None = None
    logprobs: bool = False
    # for each choice, the text of the prompt that its text begins with
    echo: list[str] = field(default_factory=list)

    @property
    def schema(self) -> str | None:
        return self.choices[0].sampling.schema

    @property
    def is_constrained(self) -> bool:
        """Whether the choices follow a schema or a grammar."""
        return self.tool_choice is not None or self.schema is not None

    def parser(self) -> Parser:
        form = self.tool_choice.form if self.tool_choice else None
        return Parser(self.is_thinking, self.tools, form, constrained=self.is_constrained, single_call=self.single_call)


class RequestPreparer:
    """Prepares requests for one model; `window` is how many tokens prompt and completion may have together."""

    def __init__(self, tokenizer: Tokenizer, window: int, longest_token: int) -> None:
        self.tokenizer, self.window, self.longest_token = tokenizer, window, longest_token
        known = tokenizer.generation
        self.defaults = {n: known[n] for n in DEFAULTS if isinstance(known.get(n), int | float)}
        SamplingParams(**self.defaults)  # a bad file is better found now than by every request

    def prepare(self, request: ChatRequest | CompletionRequest, seed: int) -> PreparedRequest:
        """The engine's input for a request; ApiError 400 or UserError where it cannot be served."""
        return self._chat(request, seed) if isinstance(request, ChatRequest) else self._completion(request, seed)

    def _chat(self, request: ChatRequest, seed: int) -> PreparedRequest:
        if request.top_logprobs is not None and not request.logprobs:
            raise bad("top_logprobs needs logprobs: true", "top_logprobs")
        last = request.messages[-1]
        tools = [] if request.tool_choice == "none" else [t.model_dump(exclude_none=True) for t in request.tools or ()]
        is_free = request.tool_choice in (None, "none", "auto")
        tool_choice = None if is_free else tool_choice_grammar(request, self.tokenizer)
        # an answer that is nothing but calls leaves nothing for a schema to constrain
        schema = _schema(request) if tool_choice is None else None
        if tools and schema is not None:
            raise bad("a JSON answer and tools cannot be combined; send one of them", "response_format")
        if schema is not None and last.prefix:
            raise bad("a begun answer cannot follow a schema; leave out prefix", "response_format")
        messages = read_messages([m.model_dump(exclude_none=True, exclude={"prefix"}) for m in request.messages])
        self._refuse_endless(sum(len(m.content) for m in messages), "messages")
        think = _thinks(request)
        if think and request.thinking is None and THINK not in self.tokenizer.ids:
            think = None  # an effort is not a demand; a model without think tokens answers without a chain
        begun = last.role == "assistant" and bool(last.prefix)
        ids, opened = encode_prompt(messages, self.tokenizer, tools=read_tools(tools), think=think, continue_last=begun)
        limit = self._limit(len(ids), request.max_completion_tokens or request.max_tokens, "messages")
        demanded = {"schema": schema, "grammar": tool_choice.grammar if tool_choice else None}
        alternatives = (request.top_logprobs or 0) if request.logprobs else None
        budget = _thinking_budget(request, limit)
        sampling = self._sampling(request, limit, thinking_budget=budget, top_logprobs=alternatives, **demanded)
        if think is False:
            sampling = without_thinking(sampling, self.tokenizer)
        choices = self._choices(ids, sampling, seed, request.n or 1, 0, opened)
        single_call = request.parallel_tool_calls is False
        return PreparedRequest(choices, opened, bool(tools), single_call, tool_choice, bool(request.logprobs))

    def _completion(self, request: CompletionRequest, seed: int) -> PreparedRequest:
        """The choices of the first prompt come first."""
        n = request.n or 1
        if request.best_of not in (None, n):
            raise bad("best_of other than n is not supported", "best_of")
        if request.echo and request.suffix:
            raise bad("echo and suffix cannot be combined", "echo")
        choices: list[ChoiceInput] = []
        echo: list[str] = []
        for prompt in request.prompts:
            ids, text = self._prompt(prompt, request)
            limit = self._limit(len(ids), request.max_tokens, "prompt")
            # a prompt that is only read gets log-probabilities, whether they are asked for or not
            prompt_logprobs = (
                (request.logprobs or 0) if (request.echo and request.logprobs is not None) or not limit else None
            )
            sampling = self._sampling(request, limit, top_logprobs=request.logprobs, prompt_logprobs=prompt_logprobs)
            choices += self._choices(ids, sampling, seed, n, len(choices), False)
            echo += [text] * n if request.echo else []
        return PreparedRequest(choices, logprobs=request.logprobs is not None, echo=echo)

    def _prompt(self, prompt: str | list[int], request: CompletionRequest) -> tuple[list[int], str]:
        """Ids of one prompt, and its text as it was sent."""
        if isinstance(prompt, str):
            self._refuse_endless(len(prompt) + len(request.suffix or ""), "prompt")
            ids, text = self.tokenizer.encode(prompt), prompt
            # training texts and dialogues begin with it; ids are used unchanged
            start = [self.tokenizer.bos] if self.tokenizer.adds_bos else []
        else:
            ids, text, start = prompt, self.tokenizer.decode(prompt) if request.echo else "", []
        if request.suffix:
            lacking = [mark for mark in FIM if mark not in self.tokenizer.ids]
            if lacking:
                raise bad(f"this model cannot fill in: its vocabulary lacks {lacking}", "suffix")
            hole, begin, end = (self.tokenizer.ids[mark] for mark in FIM)
            ids = [begin, *ids, hole, *self.tokenizer.encode(request.suffix), end]
        if not start + ids:
            raise bad("the prompt is empty", "prompt")
        return start + ids, text

    def _refuse_endless(self, characters: int, param: str) -> None:
        """A text that cannot fit is refused before it is cut into tokens, which takes seconds for megabytes."""
        least = characters // self.longest_token
        if least > self.window:
            raise self._too_long(f"at least {least}", param)

    def _limit(self, prompt: int, wanted: int | None, param: str) -> int:
        """How many tokens the completion may have."""
        room = self.window - prompt
        least = 1 if wanted is None else wanted
        if room < least:
            fits = room >= min(least, 1)  # then it is the answer that asks too much
            raise self._too_long(f"{prompt} in the prompt and {least} in the answer", "max_tokens" if fits else param)
        return room if wanted is None else wanted

    def _too_long(self, requested: str, param: str) -> ApiError:
        return bad(
            f"This model's maximum context length is {self.window} tokens, and the request is for {requested}. "
            "Shorten the prompt or ask for fewer tokens.",
            param,
            "context_length_exceeded",
        )

    def _sampling(self, request: GenerationRequest, limit: int, **more: Any) -> SamplingParams:
        given = {n: getattr(request, n) for n in CHOSEN if getattr(request, n) is not None}
        values: dict[str, Any] = {**self.defaults, **given, "max_tokens": limit, "stop": request.stops}
        values["top_k"] = max(0, int(values.get("top_k", 0)))
        values["logit_bias"] = tuple((int(token), value) for token, value in (request.logit_bias or {}).items())
        values["stop_token_ids"] = tuple(request.stop_token_ids or ())
        try:
            return SamplingParams(**values, ignore_eos=bool(request.ignore_eos), **more)
        except UserError as error:
            raise bad(f"{error.field}: {error.problem}. {error.remedy}", error.field) from None

    def _choices(
        self, ids: list[int], sampling: SamplingParams, seed: int, n: int, place: int, opened: bool
    ) -> list[ChoiceInput]:
        """n choices for one prompt; all but the first, which is number `place`, wait until that has read it."""
        return [
            ChoiceInput(ids, sampling, (seed + i) % SEEDS, opened, leader=None if i == 0 else place) for i in range(n)
        ]


def _schema(request: ChatRequest) -> str | None:
    form = request.response_format
    if form is not None and form.type == "json_schema" and form.json_schema is not None:
        return json.dumps(form.json_schema.schema_, ensure_ascii=False)
    return '{"type":"object"}' if form is not None and form.type == "json_object" else None


def _thinks(request: ChatRequest) -> bool | None:
    """Whether the request wants a chain of thought; None leaves it to the model."""
    if request.thinking is not None:
        return request.thinking.type == "enabled"
    switches = request.chat_template_kwargs
    if switches is not None:
        for value in (switches.enable_thinking, switches.thinking):
            if value is not None:
                return value
    return None if request.reasoning_effort is None else request.reasoning_effort != "none"


def _thinking_budget(request: ChatRequest, limit: int) -> int | None:
    """The longest chain of thought in tokens, of an answer of `limit`; None: no bound but that."""
    for budget in (request.thinking_budget, request.thinking.budget_tokens if request.thinking else None):
        if budget is not None:
            return budget
    share = EFFORT.get(request.reasoning_effort or "max")
    return None if share is None else max(1, int(limit * share))
