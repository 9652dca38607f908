"""Short ways to write data files and messages."""

import json
from pathlib import Path


def write(path: Path, text: str | bytes) -> Path:
    """Write a file; returns its path."""
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def jsonl(path: Path, *records) -> Path:
    """Write records one a line; returns the path."""
    lines = [json.dumps(record) + "\n" for record in records]
    return write(path, "".join(lines))


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}
