"""`python -m finback.parallel.torchrun <what torchrun takes>`: torchrun that ends with its ranks' exit code and without a traceback.

Of a rank that fails torchrun makes a traceback of its own and exit code 1, and so of a signal. The ranks have said what there is to
say: here it ends with 2 for a user's mistake and 130 where it was asked to leave. Agents that do not meet get a word as well.

The store of ranks is made anew with every start of them: torchrun's shared one lies with the agent that was first, and where another takes
that place after it has gone, agents send their ranks to different stores, and these do not meet.
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
    "Start the same line on every machine, with one --rdzv-id and an --rdzv-endpoint that all of them reach; "
    "--rdzv-conf join_timeout=SECONDS changes how long they wait. Ranks go on from the last checkpoint."
)


def main() -> int:
    """Run torchrun's own main; the exit code."""
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run.main()
    except (SignalException, KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a rank may ask as well
        return INTERRUPTED
    except RendezvousError as error:
        is_deaf = isinstance(error, RendezvousConnectionError)
        unmet = f"the agents did not meet ({type(error).__name__})"
        problem = "nobody answers at --rdzv-endpoint" if is_deaf else unmet
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
