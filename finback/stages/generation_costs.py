"""The cost of a step's generation, for its metrics and for the ledger."""

from finback.rollouts.generation import Rollouts
from finback.train.loop import Loop


def generation_costs(rollouts: Rollouts, loop: Loop) -> dict[str, float]:
    """Metrics of what all ranks generated since the last call; also adds the weights sent to servers to the ledger."""
    tallies = loop.training.world.gather(rollouts.take_tally())
    tokens, slowest = sum(t.tokens for t in tallies), max(t.seconds for t in tallies)
    sent, waited = sum(t.sync_bytes for t in tallies), max(t.sync_seconds for t in tallies)
    if sent:
        loop.usage["sync_bytes"] += sent
        loop.usage["sync_seconds"] += waited
    speed = tokens / slowest if slowest else 0.0
    costs = {"generated_per_second": speed, "generating_seconds": slowest}
    return costs | {"sync_bytes": sent, "sync_seconds": waited}
