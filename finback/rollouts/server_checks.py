"""Checks that a server agrees with the model in training: tokenizer, log-probabilities, version of the weights."""

from collections.abc import Collection

import torch

from finback.client import RequestFailed
from finback.data.tokenizer import Tokenizer
from finback.model.logprobs import token_logprobs
from finback.model.transformer import Transformer
from finback.rollouts.generation import PolicyModel
from finback.rollouts.generation_server import TEXTS, GenerationServer, TokenAnswer, TokenPrompt
from finback.rollouts.rollouts import kept_ids

PROBED = 48, 16  # tokens of the test prompt, and of its answer


def has_tokenizer(server: GenerationServer, tokenizer: Tokenizer, remedy: str) -> bool:
    """Whether it has a tokenizer; UserError if it tokenizes a text differently."""
    for text in TEXTS:
        try:
            theirs = server.tokenize(text)
        except RequestFailed as error:
            raise server.unfit(f"cannot tokenize a text: {error}", "See its log.") from None
        if theirs is None:
            return False
        if theirs != (ours := tokenizer.encode(text)):
            problem = f"different tokenizer: {text!r} has the ids {_shown(theirs)} there and {_shown(ours)} here"
            raise server.unfit(problem, remedy)
    return True


def probe_ids(policy: PolicyModel) -> tuple[list[int], int]:
    """A prompt that every model can read, and how many tokens of an answer fit after it."""
    window, (longest, answer) = policy.config.max_position_embeddings, PROBED
    ids = policy.tokenizer.encode(" ".join(TEXTS))
    ids = [policy.tokenizer.bos, *ids] if policy.tokenizer.bos >= 0 else ids
    ids = ids[: min(longest, window // 2)]
    return ids, min(answer, window - len(ids))


def check_logprobs(server: GenerationServer, prompt: TokenPrompt, model: Transformer, most: float) -> float:
    """Largest difference between the server's and the trainer's log-probabilities, in nats; UserError above `most`."""
    answer = server.answer(prompt)
    check_version(server, answer)
    if server.model.return_routed_experts and answer.routed_experts is None:
        remedy = "Start it with --enable-return-routed-experts, or leave out routing_replay."
        raise server.unfit("does not report which experts it has routed tokens to", remedy)
    ours = _scored(model, prompt, answer)
    gap = max(abs(theirs - own) for theirs, own in zip(answer.logprobs, ours, strict=True))
    if not gap <= most:  # also when it is NaN
        problem = f"its log-probabilities differ from the trainer's by {gap:.2g} nats, more than {most:g}"
        remedy = (
            "It must serve this model, in this precision, with log-probabilities after temperature, top_k and top_p "
            "(vLLM: --logprobs-mode processed_logprobs), or raise rollouts.probe_gap if you know why they differ."
        )
        raise server.unfit(problem, remedy)
    return gap


def check_version(server: GenerationServer, answer: TokenAnswer, accepted: Collection[str] = ()) -> None:
    """Raises UserError if an answer comes from weights other than those sent (or first seen) or, if weights may change during
    the answer, the accepted ones."""
    said = server.version() if answer.versions is None else None
    versions = {said} if answer.versions is None else {version for version, _, _ in answer.versions}
    if versions == {None}:
        return
    server.expected = server.expected or next(iter(versions))
    wanted = {server.expected, *accepted}
    if not versions <= wanted:
        others = ", ".join(sorted(repr(v) for v in versions if v not in wanted))
        problem = f"answers with weights {others}, not with {server.expected!r}, which were sent last"
        remedy = "Nothing else may load weights into it or restart it during a step. Run the same command again."
        raise server.unfit(problem, remedy)


@torch.no_grad()
def _scored(model: Transformer, prompt: TokenPrompt, answer: TokenAnswer) -> list[float]:
    """The trainer's log-probabilities of an answer's tokens, with the prompt's sampling parameters."""
    was_training, start = model.training, len(prompt.token_ids) - 1
    device = model.embed.device
    ids = torch.tensor([[*prompt.token_ids, *answer.tokens[:-1]]], device=device)
    kept = kept_ids(answer.sampling_mask or [])
    kept = None if kept is None else kept.to(device)
    model.eval()
    labels = torch.tensor(answer.tokens, device=device)
    logprobs, _ = token_logprobs(model, model(ids)[0, start:], labels, prompt.temperature, kept)
    model.train(was_training)
    return [float(value) for value in logprobs]


def _shown(ids: list[int]) -> str:
    return f"{ids[:12]}{'…' if len(ids) > 12 else ''}"
