"""Performance, with peers beside us in one run. Nothing imports this."""

import engine  # noqa: F401 before torch, as in every script: how waiting threads wait
