"""The production agent, killed by itself (SIGKILL) right after it has journalled one of the phases.

``python crashing_agent.py --config FILE`` with HEDGEROW_TEST_CRASH=proving in the environment.
"""

import os
import signal
import sys

from hedgerow.config import variable
from hedgerow_edge import agent
from hedgerow_edge.install import Install
from hedgerow_edge.store import Store

CRASH = "HEDGEROW_TEST_CRASH"


class CrashingStore(Store):
    """Writes the journal as it should be, and dies of it."""

    def save(self, model: str, install: Install) -> None:
        super().save(model, install)
        if install.phase == variable(CRASH):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    setattr(agent, "Store", CrashingStore)  # noqa: B010 (mypy minds the plain assignment)
    sys.exit(agent.main())
