"""Data files and messages, in few characters."""

import json
from pathlib import Path


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def jsonl(path: Path, *records) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}
