"""Per-token details of answers: log-probabilities, and the experts that each token is routed to."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from finback.data.tokenizer import Tokenizer
from finback.engine.detokenizer import Detokenizer
from finback.model.moe import MoE
from finback.model.routing import trace_routers
from finback.model.transformer import Transformer
from finback.rollouts.rollouts import Rollout, batches
from finback.train.batch import Batch
from finback.train.trainer import Trainer

# described tokens per answer; described MoE layers, spread from bottom to top; decimals of a log-probability
MOST_TOKENS, MOST_LAYERS, DIGITS = 256, 4, 4

# (model, batch) -> log-probabilities of the labels (rows, seq_len), and their entropies
Logprobs = Callable[[Transformer, Batch], tuple[Tensor, Tensor]]


class TokenDetail:
    """Describes answers with the current weights. Collective: all ranks call it with the same rows."""

    def __init__(
        self, trainer: Trainer, tokenizer: Tokenizer, logprobs: Logprobs, micro_tokens: int, whole: bool
    ) -> None:
        """whole: the layout splits neither rows nor layers, so this rank sees the experts of all tokens."""
        self.trainer, self.tokenizer, self.logprobs, self.micro_tokens = trainer, tokenizer, logprobs, micro_tokens
        blocks = trainer.model.blocks if whole else ()
        layers = [i for i, block in enumerate(blocks) if isinstance(block.feed_forward, MoE)]
        spread = torch.linspace(0, len(layers) - 1, min(MOST_LAYERS, len(layers))).round().int().tolist()
        # layers whose experts are reported
        self.layers = [layers[i] for i in spread]

    def describe(self, answers: Sequence[Rollout]) -> list[dict[str, Any]]:
        """For each answer its token texts, their log-probabilities at the training temperature, and their experts."""
        order = sorted(range(len(answers)), key=lambda i: -answers[i].length)
        found: list[dict[str, Any]] = [{} for _ in answers]
        model = self.trainer.model
        was_training, start = model.training, 0
        model.eval()  # a pass without learning must not count as router load
        with torch.no_grad():
            for batch in batches([(answers[i], 0.0) for i in order], self.micro_tokens):
                rows = order[start : start + len(batch.tokens)]
                logprobs, experts = self._read(batch.to(self.trainer.model.embed.device))
                for row, i in enumerate(rows):
                    found[i] = self._shown(answers[i], logprobs[row], None if experts is None else experts[row])
                start += len(rows)
        self.trainer.rest()
        model.train(was_training)
        return found

    def _read(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of a batch's labels, and the experts (rows, seq_len, layers, k) that its tokens are routed to."""
        model, (rows, seq_len) = self.trainer.model, batch.labels.shape
        if not self.layers:
            return self.logprobs(model, batch)[0].cpu(), None
        shape = rows * seq_len, len(model.blocks), model.config.num_experts_per_tok
        store = torch.zeros(shape, dtype=torch.int16, device=batch.labels.device)
        with trace_routers(model).recording(store, torch.arange(rows * seq_len, device=store.device)):
            logprobs = self.logprobs(model, batch)[0]
        return logprobs.cpu(), store.view(rows, seq_len, *shape[1:])[:, :, self.layers].cpu()

    def _shown(self, answer: Rollout, logprobs: Tensor, experts: Tensor | None) -> dict[str, Any]:
        tokens, begin = answer.completion.tokens[:MOST_TOKENS], len(answer.prompt)
        numbers = logprobs[begin - 1 : begin - 1 + len(tokens)].double().tolist()
        found: dict[str, Any] = {"pieces": pieces(self.tokenizer, tokens)}
        found["logprobs"] = [round(n, DIGITS) for n in numbers]
        if experts is not None:  # the model never reads the answer's last token
            sent = experts[begin : min(begin + len(tokens), answer.length - 1)].tolist()
            found |= {"expert_layers": self.layers, "experts": sent}
        return found


def pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """The text of each token; a character that spans several tokens belongs to the last of them."""
    words, found, whole = Detokenizer(tokenizer), [], 0
    for token in tokens:
        words.push([token])
        found.append("".join(words.pieces[whole:]))
        whole = len(words.pieces)
    return found
