"""`python -m finback.parallel.torchrun <torchrun's arguments>`: torchrun with its ranks' exit code and without a traceback.

If a rank fails or gets a signal, torchrun prints its own traceback and exits with 1. The ranks have already reported the
error, so this exits with 2 for a user's mistake and with 130 after a request to stop. It also reports agents that do not meet.

Ranks get a new store at every start. torchrun's shared store belongs to the agent that came first; when another agent
replaces it, agents send their ranks to different stores, and the ranks do not meet.
"""

import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousError

from finback.parallel.launch import INTERRUPTED

MEET = (
    "Run the same command on every machine, with one --rdzv-id and an --rdzv-endpoint that all of them can reach; "
    "--rdzv-conf join_timeout=SECONDS changes how long they wait. Ranks continue from the last checkpoint."
)


def main() -> int:
    """Runs torchrun's main and returns the exit code."""
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run.main()
    except (SignalException, KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ranks may send it too; see launch.dismiss_agent
        return INTERRUPTED
    except RendezvousError as error:
        is_deaf = isinstance(error, RendezvousConnectionError)
        unmet = f"the agents did not meet ({type(error).__name__})"
        problem = "no answer from --rdzv-endpoint" if is_deaf else unmet
        print(f"error: {problem}. {MEET}", file=sys.stderr)
        return 1
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"rank {rank} was killed (signal {-failure.exitcode})", file=sys.stderr)
        return max(1, failure.exitcode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
