"""The names under which a model is found: a directory, a GGUF file, or a hub id.

    models/smollm2                      a Hugging Face directory
    ~/Llama-3.2-1B-Instruct-Q8_0.gguf   a GGUF file: imported once into NAME.gguf.imported beside it
    meta-llama/Llama-3.2-1B-Instruct    a hub id that lies in the local Hugging Face cache, at its
                                        branch main; ORG/NAME@REVISION names another

Nothing is ever downloaded. A directory of that name comes first. The cache is HF_HUB_CACHE, else
HF_HOME/hub, else ~/.cache/huggingface/hub, as for huggingface_hub.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from engine.jobs.gguf_import import import_gguf
from engine.jobs.gguf_reader import parts_of
from engine.runtime.locking import lock_file
from engine.session import ModelConfig

HUB_ID = re.compile(r"(?P<org>[\w.-]+)/(?P<name>[\w.-]+)(@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{7,40}")  # the id of a commit, or its beginning
IMPORTED = ".imported"  # what is added to a GGUF file's name for its import


def with_model_found(config: ModelConfig) -> ModelConfig:
    """The config with the directory of the model in place of its name, if it names one."""
    if config.model is None:  # audit.py chooses
        return config
    return dataclasses.replace(config, model=str(find_model(config.model)))


def find_model(name: str) -> Path:
    """The Hugging Face directory of a model: itself, an import made now or before, or a snapshot.

    ValueError for a name under which nothing is found, with the command that downloads a hub id.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return _imported(path)
    match = HUB_ID.fullmatch(name)
    if path.suffix == ".gguf" and not path.exists():
        raise ValueError(f"model {name}: there is no such file")
    if match is None or path.exists():
        # the checks of a model's directory say best what is wrong with it
        return path
    return _cached(name, match)


def _imported(source: Path) -> Path:
    """The import of a GGUF file, which is made where it is missing."""
    source = parts_of(source)[0]
    out = source.with_name(source.name + IMPORTED)
    is_new = not out.exists()
    if is_new and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{source} is not imported yet, and several processes cannot share that: run python "
            f"scripts/import_gguf.py --gguf {source} --out {out} first"
        )
    if is_new:
        print(f"{source}: importing it into {out}, once", flush=True)
    try:
        with lock_file(out):
            import_gguf(source, out)
    except OSError as error:
        raise ValueError(
            f"{source} cannot be imported beside itself ({error}); import it elsewhere: python "
            f"scripts/import_gguf.py --gguf {source} --out DIR, then --model DIR"
        ) from None
    return out


def hub_cache() -> Path:
    """The directory of the local Hugging Face cache."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def _cached(name: str, match: re.Match) -> Path:
    """The snapshot of a hub id in the local cache."""
    revision = match["revision"] or "main"
    repository = f"{match['org']}/{match['name']}"
    folder = hub_cache() / f"models--{match['org']}--{match['name']}"
    download = f"hf download {repository}"
    if match["revision"]:
        download += f" --revision {revision}"
    advice = f"nothing is downloaded here; to download it: {download}"
    if not folder.is_dir():
        raise ValueError(
            f"model {name}: there is no such directory, and no {folder.name} in the Hugging Face "
            f"cache {folder.parent}; {advice}"
        )
    snapshot = _snapshot(folder, revision)
    if snapshot is None:
        raise ValueError(f"model {name}: {folder} has no snapshot of {revision}; {advice}")
    has_weights = any(snapshot.glob("*.safetensors"))
    if not (snapshot / "config.json").exists() or not has_weights:
        raise ValueError(
            f"model {name}: its snapshot {snapshot} is not complete (config.json and "
            f"*.safetensors); {advice}"
        )
    return snapshot


def _snapshot(folder: Path, revision: str) -> Path | None:
    """The snapshot of a branch, tag or commit; None where the cache has none."""
    commit = revision
    reference = folder / "refs" / revision
    if ".." not in Path(revision).parts and reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
    if COMMIT.fullmatch(commit) is None:
        return None
    found = sorted((folder / "snapshots").glob(f"{commit}*"))
    return found[0] if len(found) == 1 else None
