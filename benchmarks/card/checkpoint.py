"""The embedded model on a machine without a network: carried in halves, joined, imported.

    .gpu/part0, .gpu/part1    halves of the GGUF, since a call carries at most 64 MiB
    .gpu/wheels/              the package that reads it, where it is not installed
    .gpu/cpu/                 the CPU's files of the job (prepare.py)
    .gpu/manifest.json        sizes and hashes, and the commit that made them

`prepare.py` writes this folder. A half that an earlier call carried lies in models/, which stays on
the machine between calls.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from engine.jobs.demo import write_demo
from engine.jobs.gguf_import import import_gguf

ROOT = Path(__file__).resolve().parent.parent.parent
PREPARED = ROOT / ".gpu"
MODEL = ROOT / "models" / "smollm2-135m-instruct"
HALVES = ("part0", "part1")
PACKAGE = "gguf"


def place_model(work: Path, dry: bool) -> Path:
    """The directory of the model, imported now if it is not there.

    dry: a tiny random one in `work` instead. ValueError where a half is missing or damaged.
    """
    if dry:
        from tests.helpers.llama_dirs import write_llama  # the tests' model, in a rehearsal only

        folder = work / "tiny"
        folder.mkdir(parents=True)
        return write_llama(folder, tokenizer=True, max_position_embeddings=1024)
    if (MODEL / "config.json").exists():
        return MODEL
    install_reader()
    joined = join_halves(work / "model.gguf")
    import_gguf(joined, MODEL)
    return MODEL


def place_data(work: Path, train: int, held_out: int) -> Path:
    """The quickstart's word problems; the folder of train.json and test.json."""
    write_demo(work / "data", train, held_out)
    return work / "data"


def find_half(name: str) -> Path:
    """A half as this call carried it, or as an earlier one left it in models/."""
    for folder in (PREPARED, MODEL.parent):
        if (folder / name).exists():
            return folder / name
    raise ValueError(
        f"{name} of the model is neither in {PREPARED} nor in {MODEL.parent}; run "
        "`bash scripts/gpu.sh prepare` where there is a network, and carry .gpu/part0, .gpu/part1"
    )


def join_halves(out: Path) -> Path:
    """Write both halves into one file; ValueError where it is not the one that was divided."""
    manifest = json.loads((PREPARED / "manifest.json").read_text())
    content = b"".join(find_half(name).read_bytes() for name in HALVES)
    digest = hashlib.sha256(content).hexdigest()
    if digest != manifest["sha256"]:
        raise ValueError(f"the joined model has the hash {digest}, expected {manifest['sha256']}")
    out.write_bytes(content)
    return out


def split_file(source: Path, folder: Path) -> str:
    """Write two halves of a file into the folder; the hash of the whole."""
    content = source.read_bytes()
    middle = len(content) // 2
    for name, half in zip(HALVES, (content[:middle], content[middle:]), strict=True):
        (folder / name).write_bytes(half)
    return hashlib.sha256(content).hexdigest()


def install_reader() -> None:
    """Install the carried wheel where `gguf` is missing, into .gpu/site of this clone."""
    if importlib.util.find_spec(PACKAGE) is not None:
        return
    site = PREPARED / "site"
    wheels = sorted((PREPARED / "wheels").glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade"]
    subprocess.run([*pip, "--target", str(site), *map(str, wheels)], check=True)
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
