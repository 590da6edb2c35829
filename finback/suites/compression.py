"""Bits per byte: how well a model predicts text, independent of its tokenizer. For models in files: endpoints return no probabilities.

The passages are the validation split of the packaged dialogues, which no prepare stage puts into training text; other
models may have been trained on it. `Suite.metric` is "bits per byte", which tells callers to measure instead of asking.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

from finback.config import UserError
from finback.data.pack import is_validation
from finback.suites import dialogues
from finback.suites.problems import ProblemList, fingerprint, pick
from finback.suites.suite import Suite, SuiteSource
from finback.tasks.records import read
from finback.tasks.task import NO_ANSWER, Problem, Verdict, canonical

if TYPE_CHECKING:
    from finback.data.tokenizer import Tokenizer
    from finback.model.transformer import Transformer

METRIC = "bits per byte"
DEFAULT = 100  # passages


class Compressed(NamedTuple):
    """The cost of all passages; each token is predicted from the tokens before it in its passage."""

    bits: float
    bytes: int
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        """Bits of the text under the model, per byte of UTF-8."""
        return self.bits / self.bytes


def load(at: str, problems: int | None, seed: int) -> Suite:
    """Passages of the packaged dialogues' validation split, or the "text" of each record in `at`."""
    if at:
        texts, name, licence = [record.text("text") for record in read(at, "", "")], at, "unknown"
        if not all(map(str.strip, texts)):
            raise UserError("bits-per-byte", at, "a text is empty", "Correct the file.")
    else:
        texts = [text for text in dialogues.texts() if is_validation(text)]
        name, licence = f"{dialogues.name()}, validation side", dialogues.LICENCE
    passages = [Problem(text, "", canonical(text)) for text in dict.fromkeys(texts)]
    chosen = pick(passages, DEFAULT if problems is None else problems, seed)
    return Suite(
        name="bits-per-byte",
        problems=chosen,
        task=ProblemList("bits-per-byte", chosen, judge),
        source=SuiteSource(name, licence, fingerprint(chosen)),
        extraction="none: the probability of the text itself is measured",
        metric=METRIC,
    )


def judge(problem: Problem, answer: str) -> Verdict:
    """Returns NO_ANSWER: passages have no answers."""
    return NO_ANSWER


def measure(model: "Transformer", tokenizer: "Tokenizer", suite: Suite, rows: int = 8) -> Compressed:
    """Bits of all passages and their UTF-8 bytes. Passages longer than the model's window are split into pieces.

    Every piece starts with the begin-of-sequence token, which is not counted, so that all bytes are predicted.
    """
    import torch

    from finback.model.logprobs import text_logprobs

    bits, tokens = 0.0, 0
    pieces = [piece for problem in suite.problems for piece in _pieces(model, tokenizer, problem.question)]
    pieces.sort(key=len)
    for begin in range(0, len(pieces), rows):
        batch = pieces[begin : begin + rows]
        longest = max(map(len, batch))
        ids = torch.tensor([piece + [0] * (longest - len(piece)) for piece in batch])
        picked = text_logprobs(model, ids).double()
        for row, piece in enumerate(batch):
            bits -= picked[row, : len(piece) - 1].sum().item() / math.log(2)
            tokens += len(piece) - 1
    return Compressed(bits, sum(len(p.question.encode()) for p in suite.problems), tokens)


def _pieces(model: "Transformer", tokenizer: "Tokenizer", text: str) -> list[list[int]]:
    ids, window = tokenizer.encode(text), model.config.max_position_embeddings - 1
    first = tokenizer.bos if tokenizer.bos >= 0 else tokenizer.eos
    return [[first, *ids[start : start + window]] for start in range(0, len(ids), window)]
