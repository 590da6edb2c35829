"""Turns a validated request into the engine's input: prompts as token ids, and sampling params."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from finback.config import UserError
from finback.data.messages import begun_chain, encode_prompt
from finback.data.openai_messages import read_messages, read_tools
from finback.data.prompt_forms import knows_developer, tells_effort
from finback.data.tokenizer import END_THINK, FIM, THINK, Tokenizer
from finback.data.turn import Message
from finback.engine.request import SamplingParams
from finback.engine.sampler import without_thinking
from finback.serve.answer_grammar import AnswerGrammar, answer_grammar
from finback.serve.errors import ApiError, TooLong, bad
from finback.serve.options import ReasoningParser
from finback.serve.parser import Parser
from finback.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest
from finback.serve.thinking import reply_schema, thinking_budget, thinks
from finback.serve.tool_choice import tool_grammar
from finback.serve.translation import TranslatedRequest
from finback.serve.worker import ChoiceInput

DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # fields of generation_config.json
CHOSEN = (*DEFAULTS, "frequency_penalty", "presence_penalty")
SEEDS = 1 << 63


@dataclass(frozen=True)
class PreparedRequest:
    """A request ready for the engine, with what its response needs."""

    choices: list[ChoiceInput]
    # whether the prompt ends inside a chain of thought
    is_thinking: bool = False
    # functions that may be called, by name, with the schemas of their arguments
    tools: Mapping[str, Any] = field(default_factory=dict)
    # whether only the first call counts
    single_call: bool = False
    # required form of the output
    grammar: AnswerGrammar | None = None
    logprobs: bool = False
    # for each choice, the prompt text that its text starts with
    echo: list[str] = field(default_factory=list)
    # what was left out of the request, and why
    notes: tuple[str, ...] = ()

    # whether chains of thought are separated from the rest of the output
    chains: bool = True

    @property
    def is_constrained(self) -> bool:
        """Whether the choices follow a schema or a grammar."""
        return self.grammar is not None

    def parser(self) -> Parser:
        """A parser of the answer, which separates chains of thought, tool calls and text."""
        form = self.grammar.form if self.grammar else None
        return Parser(
            self.is_thinking,
            bool(self.tools),
            form,
            constrained=self.is_constrained,
            single_call=self.single_call,
            chains=self.chains,
            schemas=self.tools,
        )


@dataclass(frozen=True)
class EncodedPrompt:
    """The prompt of a chat request."""

    ids: list[int]
    # whether it ends inside a chain of thought
    opened: bool
    # whether the model should think; None: the model decides
    think: bool | None
    # its functions, with the schemas of their arguments
    tools: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class RequestPreparer:
    """Prepares requests for one model; prompt and answer must fit `window`; `stops` are stop tokens besides the engine's."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        window: int,
        longest_token: int,
        chains: ReasoningParser = "auto",
        adapter: str = "",
        stops: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.window, self.longest_token, self.chains = tokenizer, window, longest_token, chains
        self.adapter, self.stops = adapter, tuple(stops)
        known = tokenizer.generation
        self.defaults = {n: known[n] for n in DEFAULTS if isinstance(known.get(n), int | float)}
        SamplingParams(**self.defaults)  # detect a bad file now rather than at every request

    def prepare(self, request: ChatRequest | CompletionRequest, seed: int) -> PreparedRequest:
        """The engine's input for a request; ApiError 400 or UserError if it cannot be served."""
        if isinstance(request, CompletionRequest):
            return self._completion(request, seed)
        try:
            return self._chat(request, seed)
        except (ApiError, UserError) as error:
            raise request.blamed(error) if isinstance(request, TranslatedRequest) else error from None

    def prompt(self, request: ChatRequest) -> EncodedPrompt:
        """The prompt of a chat request."""
        last = request.messages[-1]
        tools = [] if request.tool_choice == "none" else [t.model_dump(exclude_none=True) for t in request.tools or ()]
        said = [m.model_dump(exclude_none=True, exclude={"prefix"}) for m in request.messages]
        messages = read_messages(said, knows_developer(self.tokenizer))
        self._refuse_endless(sum(len(m.content) for m in messages), "messages")
        think, notes = self._thinks(request)
        begun = last.role == "assistant" and bool(last.prefix)
        if begun:
            messages[-1], opens = begun_chain(messages[-1])
            think = True if opens else think
        if isinstance(request, TranslatedRequest):
            messages = self._allowed(messages)
        ids, opened = encode_prompt(
            messages,
            self.tokenizer,
            tools=read_tools(tools),
            think=think,
            effort=request.reasoning_effort,
            reply_schema=reply_schema(request),
            continue_last=begun,
        )
        # thinking was not disabled, and the answer has not begun
        has_answer = begun and bool(messages[-1].content)
        unmarked = self.chains == "deepseek_r1" and think is not False and not has_answer
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
        return EncodedPrompt(ids, opened or unmarked, think, schemas, notes)

    def _chat(self, request: ChatRequest, seed: int) -> PreparedRequest:
        if request.top_logprobs is not None and not request.logprobs:
            raise bad("top_logprobs needs logprobs: true", "top_logprobs")
        is_demanded = request.tool_choice not in (None, "none", "auto")
        # an answer of calls only leaves nothing for a schema to constrain
        grammar = None if is_demanded else answer_grammar(request)
        if grammar is not None and request.messages[-1].prefix:
            raise bad("an answer with a prefix cannot follow a schema; leave out prefix", grammar.param)
        if is_demanded or (grammar is not None and request.tools and request.tool_choice != "none"):
            if grammar is not None and grammar.schema is None:
                raise bad(f"with tools, the answer can follow a JSON schema only, not {grammar.param}", grammar.param)
            grammar = tool_grammar(request, self.tokenizer, is_demanded, grammar)
        prompt = self.prompt(request)
        ids = prompt.ids
        clamps = isinstance(request, TranslatedRequest)
        limit = self._limit(len(ids), request.max_completion_tokens or request.max_tokens, "messages", clamps)
        demanded = {"schema": grammar.schema, "grammar": grammar.grammar} if grammar else {}
        alternatives = (request.top_logprobs or 0) if request.logprobs else None
        budget = thinking_budget(request, limit, tells_effort(self.tokenizer))
        sampling = self._sampling(request, limit, thinking_budget=budget, top_logprobs=alternatives, **demanded)
        if prompt.think is False:
            sampling = self._closed(without_thinking(sampling, self.tokenizer))
        choices = self._choices(ids, sampling, seed, request.n or 1, 0, prompt.opened)
        notes = (*prompt.notes, *(grammar.notes if grammar else ()))
        return PreparedRequest(
            choices,
            prompt.opened,
            prompt.tools,
            request.parallel_tool_calls is False,
            grammar,
            bool(request.logprobs),
            notes=(*notes, *(request.notes if isinstance(request, TranslatedRequest) else ())),
            chains=self.chains != "none",
        )

    def _thinks(self, request: ChatRequest) -> tuple[bool | None, tuple[str, ...]]:
        """Whether the model should think, None if it decides; and a note if it cannot."""
        think = thinks(request)
        if 0 in (request.thinking_budget, request.thinking.budget_tokens if request.thinking else None):
            think = False
        if think and THINK not in self.tokenizer.ids:
            # an effort is not a demand to think
            asked = request.reasoning_effort is None
            return None, ("the model has no token for a chain of thought, so it answers without one",) if asked else ()
        return think, ()

    def _closed(self, sampling: SamplingParams) -> SamplingParams:
        """The sampling params with a ban on closing a chain of thought, since none was opened."""
        bans = [(self.tokenizer.ids[END_THINK], -math.inf)] if END_THINK in self.tokenizer.ids else []
        return replace(sampling, logit_bias=(*sampling.logit_bias, *bans))

    def _allowed(self, messages: list[Message]) -> list[Message]:
        """The messages; with system messages moved to the front if the template allows them only there."""
        is_inline = any(m.role == "system" for m in messages[1:])
        if self.tokenizer.template is None or not is_inline or self._takes_inline_system:
            return messages
        text = "\n\n".join(m.content for m in messages if m.role == "system")
        return [Message("system", text), *(m for m in messages if m.role != "system")]

    @cached_property
    def _takes_inline_system(self) -> bool:
        """Whether the template accepts a system message after others."""
        turns = [Message(role, "?") for role in ("system", "user", "system", "user")]
        try:
            encode_prompt(turns, self.tokenizer)
        except UserError:
            return False
        return True

    def _completion(self, request: CompletionRequest, seed: int) -> PreparedRequest:
        """Input for a text completion; the choices of the first prompt come first."""
        n = request.n or 1
        if request.best_of not in (None, n):
            raise bad("best_of other than n is not supported", "best_of")
        if request.prompt_logprobs is not None and request.stream:
            raise bad("prompt_logprobs cannot be streamed; leave out stream", "prompt_logprobs")
        if request.echo and request.suffix:
            raise bad("echo and suffix cannot be combined", "echo")
        choices: list[ChoiceInput] = []
        echo: list[str] = []
        for prompt in request.prompts:
            ids, text = self._prompt(prompt, request)
            limit = self._limit(len(ids), request.max_tokens, "prompt")
            # a prompt that is only read always gets log-probabilities
            asked = [request.prompt_logprobs, request.logprobs if request.echo else None, 0 if not limit else None]
            prompt_logprobs = max((each for each in asked if each is not None), default=None)
            sampling = self._sampling(request, limit, top_logprobs=request.logprobs, prompt_logprobs=prompt_logprobs)
            choices += self._choices(ids, sampling, seed, n, len(choices), False)
            echo += [text] * n if request.echo else []
        return PreparedRequest(choices, logprobs=request.logprobs is not None, echo=echo)

    def _prompt(self, prompt: str | list[int], request: CompletionRequest) -> tuple[list[int], str]:
        """Token ids of a prompt, and its text as sent."""
        if isinstance(prompt, str):
            self._refuse_endless(len(prompt) + len(request.suffix or ""), "prompt")
            ids, text = self.tokenizer.encode(prompt), prompt
            # training texts and dialogues start with bos; ids are used unchanged
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
        """Refuses a text that cannot fit before tokenizing it, which takes seconds for megabytes."""
        least = characters // self.longest_token
        if least > self.window:
            raise self._too_long(f"at least {least}", param)

    def _limit(self, prompt: int, wanted: int | None, param: str, clamps: bool = False) -> int:
        """Number of tokens for the answer: at most `wanted` if it `clamps`, else exactly `wanted`."""
        room = self.window - prompt
        wanted = None if wanted == -1 or (clamps and (wanted or 0) > room) else wanted
        least = 1 if wanted is None else wanted
        if room < least:
            fits = room >= min(least, 1)  # the prompt fits, so max_tokens is at fault
            raise self._too_long(f"{prompt} in the prompt and {least} in the answer", "max_tokens" if fits else param)
        return room if wanted is None else wanted

    def _too_long(self, requested: str, param: str) -> ApiError:
        return TooLong(requested, self.window, param)

    def _sampling(self, request: GenerationRequest, limit: int, **more: Any) -> SamplingParams:
        given = {n: getattr(request, n) for n in CHOSEN if getattr(request, n) is not None}
        values: dict[str, Any] = {**self.defaults, **given, "max_tokens": limit, "stop": request.stops}
        values["top_k"] = max(0, int(values.get("top_k", 0)))
        values["logit_bias"] = tuple((int(token), value) for token, value in (request.logit_bias or {}).items())
        values["stop_token_ids"] = (*(request.stop_token_ids or ()), *(() if request.ignore_eos else self.stops))
        try:
            return SamplingParams(**values, ignore_eos=bool(request.ignore_eos), **more)
        except UserError as error:
            raise bad(f"{error.field}: {error.problem}. {error.remedy}", error.field) from None

    def _choices(
        self, ids: list[int], sampling: SamplingParams, seed: int, n: int, place: int, opened: bool
    ) -> list[ChoiceInput]:
        """n choices for one prompt; all but the first, which has index `place`, wait until that has read the prompt."""
        return [
            ChoiceInput(ids, sampling, (seed + i) % SEEDS, opened, None if i == 0 else place, self.adapter)
            for i in range(n)
        ]
