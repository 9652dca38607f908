"""Files, terminal, flags, processes, signals: no other room of engine/ is imported here."""
