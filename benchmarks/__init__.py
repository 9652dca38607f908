"""Performance, with peers beside us in one run. Nothing imports this."""
