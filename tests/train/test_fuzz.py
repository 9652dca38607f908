"""200 seeded corruptions of a user's files: each works, or is a ValueError that names the file.

Five kinds of files, 40 corruptions each: a model's config and weights, adapters, data, and run
directories. A corruption changes bytes, cuts, repeats, or puts another value into a JSON document.
Nothing may escape as another exception, take long, or leave a partial output behind.
"""

import contextlib
import json
import random
import shutil
import time
import traceback

import torch

from engine.data.rows import load_rows
from engine.train.train import FrozenModel, train
from model.config import LlamaConfig
from model.llama import Llama
from model.peft_format import load_lora, save_lora
from tests.helpers.adapters import new_lora
from tests.helpers.training import LORA, SMALL, examples

CASES = 40
SLOW = 20  # seconds; a case takes a fraction of one
ODD = (None, -1, 0, 1.5, 10**12, "x", "", [], {}, True, "NaN", [1, 2], {"a": 1}, 1e308)


def corrupt_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, drop, repeat, insert or zero bytes, mostly in the header or the first lines."""
    at = rng.randrange(min(len(content), rng.choice((16, 400, 10**9))))
    size = rng.choice((1, 1, 8, 200))
    kind = rng.choice(("flip", "cut", "drop", "repeat", "insert", "zero"))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if kind == "cut":
        return content[:at]
    if kind == "drop":
        return content[:at] + content[at + size :]
    if kind == "repeat":
        return content[: at + size] + content[at:]
    if kind == "zero":
        return content[:at] + bytes(size) + content[at + size :]
    return content[:at] + rng.randbytes(size) + content[at:]


def corrupt_json(content: bytes, rng: random.Random) -> bytes:
    """Another value, or none, at a random place of the document."""
    document = json.loads(content)
    places = []

    def walk(value):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(items):
            places.append((value, key))
            if isinstance(inner, (dict, list)):
                walk(inner)

    walk(document)
    where, key = rng.choice(places)
    if rng.random() < 0.2:
        del where[key]
    else:
        where[key] = rng.choice(ODD)
    return json.dumps(document).encode()


def corrupt(file, rng: random.Random) -> None:
    """Corrupt a file in place: its values where it is JSON, three times in five, or its bytes."""
    content = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.6:
        corrupted = corrupt_json(content, rng)
    else:
        corrupted = corrupt_bytes(content, rng)
    file.write_bytes(corrupted)


def fuzz(kind, make, files, use, tmp_path):
    """`make(folder)` once; every case corrupts one of its files in a copy and calls `use`."""
    whole = tmp_path / "whole"
    outcomes = {"works": 0, "refused": 0}
    faults = []
    make(whole)
    shutil.copytree(whole, tmp_path / "control")
    use(tmp_path / "control", tmp_path / "out")
    for case in range(CASES):
        rng = random.Random(f"{kind} {case}")
        folder, out = tmp_path / f"case{case}", tmp_path / f"out{case}"
        shutil.copytree(whole, folder)
        file = folder / rng.choice(files(folder))
        corrupt(file, rng)
        started = time.perf_counter()
        try:
            use(folder, out)
            outcomes["works"] += 1
        except ValueError as error:
            outcomes["refused"] += 1
            if file.name not in str(error):
                faults.append(f"{case}: {file.name} is not named: {error}")
            if out.exists():
                faults.append(f"{case}: {file.name}: left {out} behind")
        except BaseException as error:  # noqa: BLE001
            where = "".join(traceback.format_exception(error)[-3:])
            faults.append(f"{case}: {file.name}: {type(error).__name__}: {error}\n{where}")
        seconds = time.perf_counter() - started
        if seconds > SLOW:
            faults.append(f"{case}: {file.name}: took {seconds:.0f} s")
        shutil.rmtree(folder)
    assert not faults, f"{len(faults)} of {CASES}:\n" + "\n".join(faults)
    assert outcomes["refused"] > CASES // 4, f"{outcomes}: these corruptions prove little"


def copy_of(source):
    """A `make` that copies a folder."""
    return lambda folder: shutil.copytree(source, folder)


def forward(model, lora=None):
    with torch.no_grad():
        model.logits(torch.tensor([1, 2, 3]), lora)


def test_a_corrupted_config_works_or_is_refused_by_name(tiny_llama_dir, tmp_path):
    def use(folder, out):
        forward(Llama.from_pretrained(folder))

    fuzz("config", copy_of(tiny_llama_dir()), lambda _: ["config.json"], use, tmp_path)


def test_corrupted_weights_work_or_are_refused_by_name(tiny_llama_dir, tmp_path):
    def use(folder, out):
        forward(Llama.from_pretrained(folder))

    fuzz("weights", copy_of(tiny_llama_dir()), lambda _: ["model.safetensors"], use, tmp_path)


def test_a_corrupted_adapter_works_or_is_refused_by_name(tiny_llama_dir, tmp_path):
    model = Llama.from_pretrained(tiny_llama_dir())

    def use(folder, out):
        try:
            lora = load_lora(folder)
            model.bind(lora)
        except ValueError as error:
            if "this model needs" not in str(error):  # it was read: another model's adapter
                raise
            raise ValueError(f"{error} (adapter_config.json, adapter_model.safetensors)") from None
        forward(model, lora)

    def make(folder):
        save_lora(new_lora(model, modules="all"), folder)

    names = ["adapter_config.json", "adapter_model.safetensors"]
    fuzz("adapter", make, lambda _: names, use, tmp_path)


def test_corrupted_data_files_work_or_are_refused_by_name(tmp_path):
    rows = [{"instruction": f"Say {i} é", "input": "", "output": f"ok {i}"} for i in range(6)]

    def make(folder):
        folder.mkdir()
        (folder / "a.json").write_text(json.dumps(rows))
        (folder / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / "c.csv").write_text("goal,target\n" + "".join(f'"do {i}",y\n' for i in range(6)))

    def use(folder, out):
        load_rows(folder / "a.json")
        load_rows(folder / "b.jsonl")
        load_rows(folder / "c.csv", columns={"prompt": "goal", "response": "target"})

    fuzz("data", make, lambda _: ["a.json", "b.jsonl", "c.csv"], use, tmp_path)


def test_a_corrupted_run_directory_is_resumed_or_refused_by_name(tiny_llama_dir, tmp_path):
    """Of a killed run; one of the files that resuming reads is corrupted."""
    model = Llama.from_pretrained(tiny_llama_dir(layers=1))
    rows = examples(8)

    def go(folder):
        return train(FrozenModel(model, "b", "h"), rows, LORA, SMALL, folder, resume=True)

    def make(folder):
        go(folder)
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(
            json.dumps({"settings": meta["settings"], "finished": False})
        )
        shutil.rmtree(folder / "checkpoints" / "step-000004")

    def files(_):
        saved = "checkpoints/step-000003"
        return [
            "meta.json",
            f"{saved}/optimizer.safetensors",
            f"{saved}/state.json",
            "metrics.jsonl",
        ]

    def use(folder, out):
        with contextlib.redirect_stdout(None):
            go(folder)

    fuzz("run", make, files, use, tmp_path)


def test_a_config_that_works_is_read_as_written(tiny_llama_dir):
    """The control: a config that is not corrupted is accepted."""
    assert LlamaConfig.from_dir(tiny_llama_dir()).num_layers == 2
