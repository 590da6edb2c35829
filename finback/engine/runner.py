"""Forward passes of the engine: pieces of prompts, single tokens, and MTP drafts."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from finback.engine.request import FinishReason, Request
from finback.engine.sampler import Sampler, sample, top_logprobs
from finback.engine.scheduler import Scheduler
from finback.engine.speculate import NGRAM_DRAFTS, Drafting, PromptLookup, Speculation
from finback.model.cache import PAGE, Cache, Pool
from finback.model.compressed_cache import CompressedCache, CompressedPool
from finback.model.multi_lora import adapters_of_rows
from finback.model.picking import Choices
from finback.model.transformer import Transformer


@dataclass(frozen=True, eq=False)
class Runner:
    """Runs the scheduler's requests through the model; `chunk` is the maximal number of prompt tokens per pass.

    With `choices` the pool stores each token's experts or selected entries next to its cache entries, so cached prefixes have
    them too.
    """

    model: Transformer
    scheduler: Scheduler
    pool: Pool
    sampler: Sampler
    chunk: int
    speculation: Speculation | None
    choices: Choices | None = None
    drafting: Drafting = "mtp"

    def __post_init__(self) -> None:
        self.scheduler.on_preempt = self.keep_choices
        self.scheduler.on_continue = lambda request, line: self.pool.continue_from(request.slot, line)

    @property
    def mtp(self) -> bool:
        """Whether the MTP module drafts."""
        return self.speculation is not None and self.drafting == "mtp"

    def read_prompts(self) -> list[Request]:
        """Reads one piece of unread prompts. Returns the requests that got their first token."""
        rows, counts = self._pieces()
        if not rows:
            return []
        starts = [r.computed for r in rows]
        tokens = torch.zeros(len(rows), max(counts), dtype=torch.long)
        for line, (r, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            tokens[line, :count] = torch.tensor(r.slice(start, start + count))
        hidden, states = self._forward(rows, tokens, counts)
        for line, (r, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            r.computed = start + count
            if r.sampling.prompt_logprobs is not None and start < len(r.prompt) - 1:
                self._prompt_logprobs(r, hidden[line], start, count)
        whole = [line for line, r in enumerate(rows) if r.computed == r.length]
        self._lead([(rows[line], states[line, counts[line] - 1]) for line in whole])
        done = [rows[line] for line in whole if rows[line].sampling.max_tokens > 0]
        if done:
            last = torch.tensor([line for line in whole if rows[line].sampling.max_tokens > 0], device=hidden.device)
            ends = torch.tensor([counts[line] - 1 for line in last.tolist()], device=hidden.device)
            self._sample(done, self.model.logits(hidden[last, ends]))
        for line in whole:
            if rows[line].sampling.max_tokens == 0:
                self._end_with(rows[line], "length")
        self._draft(rows, states, starts, counts)
        for r in rows:
            if r.finish_reason is None:
                self.scheduler.publish(r)
                self.scheduler.keep_line(r, self.pool.line)
        return [rows[line] for line in whole]

    def _lead(self, read: list[tuple[Request, Tensor]]) -> None:
        """Stores what followers need from requests that have just read their prompts, with their last states."""
        for r, state in read:
            if r.followers and not r.tokens:
                self.scheduler.lead(r, state.clone(), self.pool.line(r.slot))

    def begin_forked(self) -> list[Request]:
        """First tokens for requests whose prompts were read by others. Returns these requests."""
        forked, self.scheduler.forked = self.scheduler.forked, []
        if not forked:
            return []
        rows = [r for r, _ in forked]
        self.pool.copy([p.pages[-1] for _, p in forked], [r.pages[len(p.pages) - 1] for r, p in forked])
        for r, prefix in forked:
            self.pool.continue_from(r.slot, prefix.line)
        known = list(dict.fromkeys(p for _, p in forked))
        states = torch.stack([p.state for p in known])
        hidden = self.model.hidden_of(states) if self.mtp else states
        each = torch.tensor([known.index(p) for _, p in forked], device=hidden.device)
        self._sample(rows, self.model.logits(hidden)[each])
        for r in rows:
            # row state is stored before MTP has read these tokens
            r.drafts_from = len(r.prompt) - 1 if self.pool.lined else 0
        self._draft(rows, states[each][:, None], [len(r.prompt) - 1 for r in rows], [1] * len(rows))
        for r in rows:
            if r.finish_reason is None:
                self.scheduler.publish(r)
        return rows

    def _pieces(self) -> tuple[list[Request], list[int]]:
        """The requests whose prompts are read next, and how many tokens of each: oldest first, `chunk` tokens in total."""
        rows: list[Request] = []
        counts: list[int] = []
        for r in self.scheduler.running:
            left = r.length - r.computed
            if not r.reads or (rows and (rows[0].computed == 0) != (r.computed == 0)):
                continue  # reading a prompt from its start is cheaper, so these are not mixed
            count = min(left, self.chunk)
            if self.scheduler.lined:
                # stop at the end of a page that can be shared, if the piece reaches one
                count = max(min(r.computed + count, r.length - 1) // PAGE * PAGE - r.computed, 0) or count
            if rows and (len(rows) + 1) * max(*counts, count) > self.chunk:
                break
            rows.append(r)
            counts.append(count)
        return rows, counts

    def _prompt_logprobs(self, r: Request, hidden: Tensor, start: int, count: int) -> None:
        known = max(0, len(r.prompt_logprobs) - start)  # recorded before it was preempted
        following = r.prompt[start + 1 + known : start + count + 1]
        if following:
            logits = self.model.logits(hidden[known : known + len(following)])
            r.prompt_logprobs += top_logprobs(logits, following, [r.sampling.prompt_logprobs or 0] * len(following))

    def decode(self, rows: list[Request]) -> None:
        """One more token for each row, and one for each draft that is right."""
        kind = self.speculation.choose(len(rows)) if self.speculation else "plain"
        began = time.perf_counter()
        guesses = [self._guesses(r) if kind == "draft" else [] for r in rows]
        starts = [r.computed for r in rows]
        counts = [1 + len(guess) for guess in guesses]
        new = max(counts)
        last = ([r.tokens[-1] if r.tokens else r.prompt[-1]] for r in rows)
        tokens = torch.tensor([[*t, *g, *[0] * (new - 1 - len(g))] for t, g in zip(last, guesses, strict=True)])
        hidden, states = self._forward(rows, tokens, counts)
        logits = self.model.logits(hidden)
        for r, guess in zip(rows, guesses, strict=True):
            r.computed += 1
            r.drafted += len(guess)
        self._lead(list(zip(rows, states[:, 0], strict=True)))  # the last token of a prompt may be read here
        self._sample(rows, logits[:, 0])
        read = self._verify(rows, guesses, logits)
        after = time.perf_counter()
        if kind != "plain":
            self._draft(rows, states, starts, read)
        if self.speculation is not None:
            took = (time.perf_counter() if kind == "draft" else after) - began
            if kind != "draft" or new > 1:
                drafted = sum(counts) - len(counts) if self.drafting == "mtp" else len(rows) * (new > 1)
                self.speculation.saw(len(rows), kind, took, drafted, sum(read) - len(read))
        for r in rows:
            if r.finish_reason is None:
                if kind == "plain":
                    r.draft, r.drafts_from = -1, r.computed
                self.scheduler.publish(r)
                self.scheduler.keep_line(r, self.pool.line)

    def _guesses(self, r: Request) -> list[int]:
        """Drafts of the tokens after a row's next token, none of them beyond max_tokens."""
        room = r.end - r.length - 1
        if self.drafting == "mtp":
            return [r.draft] if r.draft >= 0 and room > 0 else []
        r.lookup = r.lookup or PromptLookup()
        return r.lookup.drafts([*r.prompt, *r.tokens], min(NGRAM_DRAFTS, room)) if room > 0 else []

    def _verify(self, rows: list[Request], guesses: list[list[int]], logits: Tensor) -> list[int]:
        """Samples a token after each draft that is the token just sampled. Returns how many tokens of each row have been read.

        A row's next token is drawn from its own logits with its own random number, drafted or not.
        """
        read, right = [1] * len(rows), list(range(len(rows)))
        for place in range(logits.size(1) - 1):
            right = [
                line
                for line in right
                if len(guesses[line]) > place
                and rows[line].finish_reason is None
                and rows[line].tokens[-1] == guesses[line][place]
            ]
            if not right:
                break
            for line in right:
                rows[line].computed += 1
                rows[line].accepted += 1
                rows[line].accepted_at.append(len(rows[line].tokens) - 1)
                read[line] += 1
            self._sample([rows[line] for line in right], logits[torch.tensor(right, device=logits.device), place + 1])
        return read

    def _forward(self, rows: list[Request], tokens: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Hidden states of the trunk, (rows, new, d), for tokens (rows, new) after each row's computed ones; and the
        states that MTP starts from."""
        cache = self._cache(rows, [r.computed for r in rows], tokens.size(1), counts)
        tokens = tokens.to(self.model.embed.device)
        with adapters_of_rows(self.model, [r.adapter for r in rows]):
            if self.choices is None:
                hidden = self.model(tokens, cache)
            else:
                known = self._known_choices(rows, tokens.size(1), counts)
                with self.choices.recording(self.pool, cache.slots, known):
                    hidden = self.model(tokens, cache)
        return hidden, self.model.carried(hidden) if self.mtp else hidden

    def _known_choices(self, rows: list[Request], new: int, counts: list[int]) -> dict[str, Tensor]:
        """(rows, new, modules, k) choices, by kind, of tokens that are read again after preemption, so that they are repeated;
        -1 elsewhere."""
        found = {}
        for name, store in self.pool.choices.items():
            again = [(i, r) for i, r in enumerate(rows) if name in r.choices and r.computed < len(r.choices[name])]
            if again:
                given = torch.full((len(rows), new, *store.shape[1:]), -1, dtype=torch.int32, device=store.device)
                for line, r in again:
                    known = r.choices[name][r.computed : r.computed + counts[line]]
                    given[line, : len(known)] = known.to(given.dtype)
                found[name] = given
        return found

    def keep_choices(self, r: Request) -> None:
        """Copies the choices of a request's computed tokens from its pages, before they are released."""
        for name, store in self.pool.choices.items():
            # those of tokens being read again after preemption are already complete
            if name not in r.choices or len(r.choices[name]) < r.computed:
                pages = torch.tensor(r.pages, dtype=torch.long, device=store.device)
                r.choices[name] = store.unflatten(0, (-1, self.pool.size))[pages].flatten(0, 1)[: r.computed]

    def _cache(
        self, rows: list[Request], lengths: list[int], new: int, counts: list[int], starts: list[int] | None = None
    ) -> Cache:
        used = -(-(max(lengths) + new) // PAGE)
        table = self.scheduler.table[[r.slot for r in rows], :used].to(self.model.embed.device)
        if isinstance(self.pool, CompressedPool):
            return CompressedCache(self.pool, table, lengths, new, counts, starts, [r.slot for r in rows])
        return Cache(self.pool, table, lengths, new, counts, starts, [r.length for r in rows])

    def _draft(self, rows: list[Request], states: Tensor, starts: list[int], counts: list[int]) -> None:
        """Updates MTP's cache entries and drafts the token after the last one of each row.

        `states` (rows, new, …): MTP's input, from positions `starts` on; `counts` of them are not padding.
        """
        if not self.mtp:
            return
        alive = [i for i, r in enumerate(rows) if r.finish_reason is None and r.slot >= 0]
        if not alive:
            return
        rows, starts, counts = ([group[i] for i in alive] for group in (rows, starts, counts))  # type: ignore[assignment]
        new = max(counts)
        known = [
            r.slice(start + 1, min(start + 1 + n, r.length)) for r, start, n in zip(rows, starts, counts, strict=True)
        ]
        following = torch.tensor([line + [0] * (new - len(line)) for line in known])
        froms = [min(r.drafts_from, start) for r, start in zip(rows, starts, strict=True)]
        cache = self._cache(rows, starts, new, counts, froms if any(froms) else None)
        device = states.device
        if len(alive) < len(states):
            states = states[torch.tensor(alive, device=device)]
        drafted = self.model.draft(states[:, :new], following.to(device), cache)
        ready = [i for i, r in enumerate(rows) if r.computed == r.length - 1]
        if ready:
            at = torch.tensor([i * new + counts[i] - 1 for i in ready], device=device)
            guessers = [rows[i] for i in ready]
            logits = self.model.logits(drafted.flatten(0, 1)[at])
            # with the same random number as the token itself: similar distributions give equal choices
            uniform = torch.tensor([r.uniform() for r in guessers], device=device)
            batch = self.sampler.batch(guessers, logits)
            guesses = logits.argmax(dim=-1) if batch.all_greedy else sample(logits, batch, uniform)[0]
            for r, token in zip(guessers, guesses.tolist(), strict=True):
                r.draft = token

    def _sample(self, rows: list[Request], logits: Tensor) -> None:
        for r, reason in self.sampler.sample(rows, logits):
            self._end_with(r, reason)

    def _end_with(self, r: Request, reason: FinishReason) -> None:
        self.keep_choices(r)
        self.scheduler.publish(r)
        self.scheduler.keep_line(r, self.pool.line)
        self.scheduler.finish(r, reason)
        if r.detokenizer is not None:
            r.detokenizer.end()
