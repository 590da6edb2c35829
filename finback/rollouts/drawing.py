"""Selects the questions to ask: those that fit the model's window; a file's questions each once per epoch."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from finback.config import UserError
from finback.data.messages import encode_prompt
from finback.data.tokenizer import Tokenizer
from finback.data.turn import Message
from finback.model.config import ModelConfig
from finback.tasks import task as tasks
from finback.tasks.task import Mixture, Problem, Task, is_held_out, listed

TRIES = 1000  # consecutive questions that may be too long before giving up


class Window:
    """The model's context window, shared by question and answer."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, max_tokens: int, think: bool = False) -> None:
        self.tokenizer, self.size = tokenizer, config.max_position_embeddings
        self.max_tokens, self.think = max_tokens, think

    def prompt(self, problem: Problem) -> tuple[list[int], bool]:
        """The token ids of a question's prompt, and whether they end inside a chain of thought."""
        return encode_prompt([Message("user", problem.question)], self.tokenizer, think=self.think or None)

    def fits(self, problem: Problem) -> bool:
        """Whether a question leaves room for an answer of max_tokens."""
        return len(self.prompt(problem)[0]) + self.max_tokens <= self.size

    def fitting(self, problems: Sequence[Problem]) -> list[Problem]:
        """The problems that fit, in order; UserError if there are problems but none fits."""
        kept = [problem for problem in problems if self.fits(problem)]
        if problems and not kept:
            raise self.too_long(problems[0])
        return kept

    def too_long(self, problem: Problem) -> UserError:
        """The error for a question that does not fit; it names the task, since the user did not write the request."""
        shown = problem.question if len(problem.question) <= 60 else f"{problem.question[:60]}…"
        needs = f"its {len(self.prompt(problem)[0])} tokens and max_tokens = {self.max_tokens}"
        remedy = "Leave out such questions, lower max_tokens, or use a model with a longer window."
        return UserError("question", shown, f"{needs} exceed the model's window of {self.size} tokens", remedy)

    def remark(self, left_out: int) -> str:
        """A sentence on questions that were left out."""
        return f"{left_out:,} questions left out: with max_tokens = {self.max_tokens} they exceed the window of {self.size} tokens"


class QuestionOrder:
    """A task's training questions, in the order in which training asks them.

    A file's questions come in epochs, each shuffled by the seed and the epoch's number, so none repeats before all have been
    asked; questions that do not fit the window or that an exam asks (`exam` names it) are removed first. Generated questions
    are drawn at random; those that do not fit are skipped. `state` is all that resuming needs.
    """

    def __init__(
        self,
        task: Task,
        window: Window,
        seed: Callable[..., int],
        say: Callable[[str], None],
        exam: Callable[[Problem], str | None] = lambda problem: None,
        validation: frozenset[str] = frozenset(),
    ) -> None:
        """validation: keys of the validation set's questions, which are not asked."""
        self.task, self.window, self.seed, self.say, self.exam = task, window, seed, say, exam
        self.validation = validation
        # number of questions that exams or the validation set ask, by exam
        self.contaminated: Counter[str] = Counter()
        parts = task.tasks if isinstance(task, Mixture) else (task,)
        listed = {place: self._listed(part) for place, part in enumerate(parts)}
        self.lists = {place: window.fitting(problems) for place, problems in listed.items() if problems}
        # number of questions that were too long
        self.too_long = sum(map(len, listed.values())) - sum(map(len, self.lists.values()))
        # number of questions drawn from each list
        self.drawn = dict.fromkeys(self.lists, 0)
        self._orders: dict[int, tuple[int, list[int]]] = {}
        if self.too_long:
            say(window.remark(self.too_long))
        if self.contaminated:
            say(exam_remark(self.contaminated))

    @property
    def is_listed(self) -> bool:
        """Whether the next question depends on what was drawn before."""
        return bool(self.lists)

    def draw(self, rng: random.Random) -> Problem:
        """The next question. `rng` draws generated ones, and the task within a mixture."""
        for _ in range(TRIES):
            problem, place = self._next(rng)
            if problem.key in self.validation:
                continue
            if place in self.lists or self.window.fits(problem):
                return problem
            if not self.too_long:
                self.say(self.window.remark(1).replace("left out", "and later ones left out"))
            self.too_long += 1
        raise self.window.too_long(problem)

    def state(self) -> dict[str, Any]:
        """JSON values for `load_state`."""
        return {"drawn": list(self.drawn.values()), "too_long": self.too_long}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned; starts from the beginning if an older version stored no order."""
        if not state:
            return
        self.drawn = dict(zip(self.lists, map(int, state["drawn"]), strict=True))
        self.too_long = int(state["too_long"])

    def _next(self, rng: random.Random) -> tuple[Problem, int]:
        if not self.lists:
            return tasks.draw(self.task, "train", rng), -1
        if not isinstance(self.task, Mixture):
            return self._of_list(0), 0
        for _ in range(100_000):
            place = self.task.place(rng)
            problem = self._of_list(place) if place in self.lists else self.task.tasks[place].draw(rng)
            if place in self.lists or not is_held_out(problem.key):
                return self.task.tagged(problem, place), place
        raise UserError("task", self.task.name, "no train problem in 100,000 draws", "Widen the task's ranges.")

    def _of_list(self, place: int) -> Problem:
        problems = self.lists[place]
        epoch, position = divmod(self.drawn[place], len(problems))
        self.drawn[place] += 1
        if self._orders.get(place, (-1, []))[0] != epoch:
            order = list(range(len(problems)))
            random.Random(self.seed("order", place, epoch)).shuffle(order)
            self._orders[place] = epoch, order
        return problems[self._orders[place][1][position]]

    def _listed(self, task: Task) -> list[Problem]:
        """All training problems of a task that has a list; empty for a generator."""
        every = listed(task)
        train = [problem for problem in every if not is_held_out(problem.key)]
        kept = []
        for problem in train:
            if exam := self.exam(problem) or ("validation" if problem.key in self.validation else None):
                self.contaminated[exam] += 1
            else:
                kept.append(problem)
        if every and not kept:
            asked = f": exams ask all {len(train)} ({', '.join(self.contaminated)})" if train else ""
            raise UserError("task", task.name, f"it has no training problems{asked}", "Give more records.")
        return kept


def exam_remark(left_out: Counter[str], what: str = "questions") -> str:
    """A sentence on training questions that exams also ask, by exam."""
    exams = ", ".join(f"{exam} ({n:,})" for exam, n in left_out.items())
    return f"{left_out.total():,} {what} left out because exams ask them: {exams}"
