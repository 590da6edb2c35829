"""`python -m finback.parallel.torchrun <what torchrun takes>`: torchrun that ends with its ranks' exit code and without a traceback.

Of a rank that fails torchrun makes a traceback of its own and exit code 1, and so of a signal. The ranks have said what there is to
say: here it ends with 2 for a user's mistake and 130 where it was asked to leave.

The store of ranks is made anew with every start of them: torchrun's shared one lies with the agent that was first, and where another takes
that place after it has gone, agents send their ranks to different stores, and these do not meet.
"""

import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from finback.parallel.launch import INTERRUPTED


def main() -> int:
    """Run torchrun's own main; the exit code."""
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run.main()
    except (SignalException, KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a rank may ask as well
        return INTERRUPTED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"rank {rank} was killed (signal {-failure.exitcode})", file=sys.stderr)
        return max(1, failure.exitcode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
