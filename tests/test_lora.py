"""Adapters: the same numbers in peft, both ways; what is refused; merging, on disk and in memory.

`peers` tests ask peft itself. tests/golden/peft holds an adapter that peft wrote and the logits it
computed with it. To make it anew:

    UPDATE_GOLDEN=1 python -m pytest tests/test_lora.py -m peers
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.adamw import AdamW
from kernels.context import Packed
from model.llama import Llama, Tape
from model.lora import PRESETS, Lora, merge
from model.weights import rewrite_checkpoint
from tests.shards import split

ROOT = Path(__file__).resolve().parent.parent
GOLDEN, SMOLLM2 = ROOT / "tests/golden/peft", ROOT / "tests/golden/smollm2.json"
UPDATE = os.environ.get("UPDATE_GOLDEN") == "1"
TOKENS = torch.randint(320, (40,), generator=torch.Generator().manual_seed(7)).tolist()
CONVERSATIONS = [
    (
        "A pen costs 3 dollars and a book costs 12. What do two pens and a book cost?",
        "Two pens cost 2 * 3 = 6 dollars. With the book that is 6 + 12 = 18. The answer is 18.",
    ),
    ("Name the capital of Japan.", "Tokyo."),
    (
        "Why do leaves turn yellow in autumn?",
        "The green chlorophyll breaks down, and yellow pigments that were there all along show.",
    ),
    ("Write a greeting for a birthday card.", "Happy birthday, Zoë! 🎂 May the year be kind."),
]


def random_lora(model, modules, rslora=False, rank=8):
    """An adapter that does something: B is not zero."""
    lora = Lora.init(model, rank=rank, alpha=16.0, modules=modules, seed=3, rslora=rslora)
    generator = torch.Generator().manual_seed(4)
    for name, view in lora.views(lora.params).items():
        if ".lora_B." in name:
            view.copy_(0.02 * torch.randn(view.shape, generator=generator))
    return lora


def add_gradient(model, lora, rows):
    """Sum over the response tokens of all rows, packed into one forward, added to lora.grads."""
    tokens, targets, select = [], [], []
    for ids, prompt in rows:
        select += range(len(tokens) + prompt - 1, len(tokens) + len(ids) - 1)
        tokens, targets = tokens + ids, targets + ids[prompt:]
    tape = Tape("selective")
    packed = Packed.from_lengths([len(ids) for ids, _ in rows])
    hidden = model.forward(torch.tensor(tokens), packed, lora=lora, tape=tape)
    _, dselected = model.ops.linear_cross_entropy(
        hidden[select], model.weights["head"], torch.tensor(targets)
    )
    dhidden = torch.zeros_like(hidden).index_copy_(0, torch.tensor(select), dselected)
    model.backward(dhidden, tape)


def train(model, lora, rows, steps, lr=1e-3):
    """A few steps as engine/train.py takes them; the last step's gradient stays in lora.grads."""
    m, v = torch.zeros_like(lora.params), torch.zeros_like(lora.params)
    for step in range(1, steps + 1):
        lora.grads.zero_()
        add_gradient(model, lora, rows)
        scalars = AdamW().scalars(lr, step, 1 / sum(len(ids) for ids, _ in rows), "cpu")
        model.ops.adamw_(lora.params, lora.grads, m, v, scalars, AdamW())
    return lora


def random_rows(vocab=320):
    generator = torch.Generator().manual_seed(5)
    return [(torch.randint(vocab, (n,), generator=generator).tolist(), n // 3) for n in (9, 30, 14)]


def real_rows(path):
    tokenizers = pytest.importorskip("tokenizers", reason="extra `bpe`")
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    rows = []
    for question, answer in CONVERSATIONS:
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer.encode(prompt).ids
        rows.append((ids + tokenizer.encode(f"{answer}<|im_end|>").ids, len(ids)))
    return rows


def ask_peft(run_peer, tmp_path, **jobs):
    (tmp_path / "jobs.json").write_text(json.dumps(jobs, default=str))
    run_peer("lora_peer.py", tmp_path / "jobs.json", tmp_path / "out.safetensors")
    return load_file(tmp_path / "out.safetensors")


def distance(a, b):
    return (a.double() - b.double()).abs().max().item()


def assert_as_close_as_peft(name, logits, theirs):
    """No further from the fp64 truth than twice peft's own fp32 logits."""
    truth = theirs[f"{name}/fp64"]
    error, unit = distance(logits, truth), distance(theirs[f"{name}/fp32"], truth)
    print(f"{name}: error {error:.3g}, peft's own {unit:.3g}")
    assert error <= 2 * unit, f"{name}: error {error:.3g}, peft's own {unit:.3g}"


def assert_same_gradients(name, ours, theirs, tolerance):
    """Of every tensor, relative to its largest element."""
    prefix = f"{name}/grad/base_model.model."
    want = {n.removeprefix(prefix): t for n, t in theirs.items() if n.startswith(prefix)}
    assert want.keys() == ours.keys()
    worst = 0.0
    for tensor, gradient in want.items():
        scale = gradient.abs().max().item()
        assert scale > 0, f"{tensor} has no gradient: the test would prove nothing"
        error = distance(ours[tensor], gradient) / scale
        assert error < tolerance, f"{name} {tensor}: relative error {error:.2g}"
        worst = max(worst, error)
    print(f"{name}: worst relative error of {len(want)} gradients {worst:.3g}")


# ---- against peft itself


@pytest.mark.peers
def test_smollm2_gradients_and_logits_equal_pefts(smollm2_dir, run_peer, tmp_path):
    """Every tensor's gradient on four rows, then the logits after a step along it; tied head."""
    model, rows = Llama.from_pretrained(smollm2_dir), real_rows(smollm2_dir)
    tokens = [token for ids, _ in rows for token in ids][:100]
    loras, gradients, logits, jobs = {}, {}, {}, {"logits": {}, "gradients": {}}
    for modules in ("qv", "all"):
        lora = loras[modules] = random_lora(model, modules)
        before, after = tmp_path / f"{modules}-before", tmp_path / f"{modules}-after"
        lora.save(before, base=smollm2_dir)
        train(model, lora, rows, steps=1)
        lora.save(after, base=smollm2_dir)
        gradients[modules] = lora.views(lora.grads.clone())
        logits[modules] = model.logits(torch.tensor(tokens), Lora.load(after))
        place = {"dir": smollm2_dir}
        jobs["gradients"][modules] = {**place, "adapter": before, "rows": rows, "dtype": "float32"}
        jobs["logits"][modules] = {**place, "adapter": after, "tokens": tokens}
    theirs = ask_peft(run_peer, tmp_path, **jobs)
    for modules in ("qv", "all"):
        assert_as_close_as_peft(modules, logits[modules], theirs)
        assert_same_gradients(modules, gradients[modules], theirs, tolerance=1e-4)


# What peft may be asked to make on a small model: name -> arguments of its LoraConfig
PLAIN = {
    "q,v": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "all-linear": {"target_modules": "all-linear", "r": 3, "lora_alpha": 7, "lora_dropout": 0.1},
    "pattern": {"target_modules": r".*\.(k_proj|down_proj)", "r": 2, "lora_alpha": 16},
    "rslora": {"target_modules": ["o_proj", "up_proj"], "r": 16, "use_rslora": True},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
}
REFUSED = {
    "use_dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 2}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "trainable_token_indices": {"trainable_token_indices": [3]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
}


@pytest.mark.peers
def test_small_adapters_both_ways(tiny_llama_dir, run_peer, tmp_path):
    """Ours in peft and peft's here, untied with an explicit head_dim; what peft is not plain in."""
    path = tiny_llama_dir(head_dim=32, hidden=64, tied=False)
    model, exact = Llama.from_pretrained(path), Llama.from_pretrained(path, dtype=torch.float64)
    jobs, loras, gradients, place = (
        {"make": {}, "logits": {}, "gradients": {}},
        {},
        {},
        {"dir": path},
    )
    for modules in PRESETS:
        for rslora in (False, True):
            name = f"ours-{modules}-{'rslora' if rslora else 'lora'}"
            loras[name] = train(model, random_lora(model, modules, rslora), random_rows(), steps=3)
            loras[name].save(tmp_path / name, base=path)
            here = {**place, "adapter": tmp_path / name}
            jobs["logits"][name] = {**here, "tokens": TOKENS}
            jobs["gradients"][name] = {**here, "rows": random_rows(), "dtype": "float64"}
            again = Lora.load(tmp_path / name)
            again.bind(exact)
            add_gradient(exact, again, random_rows())
            gradients[name] = again.views(again.grads)
    for name, config in PLAIN.items():
        config = {"init_lora_weights": False, **config}
        jobs["make"][name] = {**place, "out": tmp_path / name, "config": config}
        jobs["logits"][name] = {**place, "adapter": tmp_path / name, "tokens": TOKENS}
    for name, config in {"untrained": {}, **REFUSED}.items():
        config = {"target_modules": ["q_proj", "v_proj"], **config}
        jobs["make"][name] = {**place, "out": tmp_path / name, "config": config}
    theirs = ask_peft(run_peer, tmp_path, **jobs)

    plain = model.logits(TOKENS)
    for name, gradient in gradients.items():
        assert_same_gradients(name, gradient, theirs, tolerance=1e-9)
    for name in jobs["logits"]:
        logits = model.logits(TOKENS, loras.get(name) or Lora.load(tmp_path / name))
        assert_as_close_as_peft(name, logits, theirs)
        logits64 = exact.logits(TOKENS, Lora.load(tmp_path / name))
        assert distance(logits64, theirs[f"{name}/fp64"]) < 1e-11, f"{name}: another function"
        assert distance(logits, plain) > 1e-2, f"{name} does nothing: the test would prove nothing"
    assert torch.equal(model.logits(TOKENS, Lora.load(tmp_path / "untrained")), plain)
    for name in REFUSED:
        with pytest.raises(ValueError, match=rf"adapter_config.json: {name} = "):
            Lora.load(tmp_path / name)
    if UPDATE:
        shutil.rmtree(GOLDEN, ignore_errors=True)
        GOLDEN.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(tmp_path / "all-linear" / file, GOLDEN / file)
        logits = {"tokens": torch.tensor(TOKENS), "logits": theirs["all-linear/fp64"][-8:].float()}
        save_file(logits, GOLDEN / "logits.safetensors")


@pytest.mark.peers
def test_merged_models_in_transformers(smollm2_dir, tiny_llama_dir, run_peer, tmp_path):
    """The logits of base and adapter: in fp32 as near as peft's unmerged fp32 ones come, twice;
    in 16 bits, where the rounding of the weights decides, as near as peft's own merged model."""
    half = tiny_llama_dir(dtype=torch.bfloat16, tied=False)
    sources = {
        "smollm2": smollm2_dir,
        "f32": tiny_llama_dir(),
        "f16": tiny_llama_dir(dtype=torch.float16),
        "bf16": half,
        "sharded-bf16": split(half, tmp_path / "half", 3),
    }
    sixteen = [name for name in sources if "16" in name]
    jobs = {"merge": {}, "logits": {}}
    with tempfile.TemporaryDirectory(dir=tmp_path) as place:  # pytest would keep the large ones
        for name, source in sources.items():
            adapter, ours, theirs = (Path(place, f"{name}-{k}") for k in ("lora", "ours", "theirs"))
            random_lora(Llama.from_pretrained(source), "all").save(adapter)
            merge(source, Lora.load(adapter), ours)
            apart = {"dir": source, "adapter": adapter, "tokens": TOKENS}
            jobs["logits"] |= {name: apart, f"{name}-ours": {**apart, "dir": ours, "adapter": None}}
            if name in sixteen:
                jobs["merge"][name] = {"dir": source, "adapter": adapter, "out": theirs}
                jobs["logits"][f"{name}-theirs"] = {**apart, "dir": theirs, "adapter": None}
        made = ask_peft(run_peer, tmp_path, **jobs)
    for name in sources:
        truth = made[f"{name}/fp64"]
        yardstick = f"{name}-theirs/fp32" if name in sixteen else f"{name}/fp32"
        error, unit = distance(made[f"{name}-ours/fp32"], truth), distance(made[yardstick], truth)
        print(f"{name}: merged {error:.3g} from base and adapter, {yardstick} {unit:.3g}")
        assert error <= 2 * unit


# ---- reading and writing


def test_adapter_of_peft_gives_the_logits_peft_gave(tiny_llama_dir):
    model = Llama.from_pretrained(tiny_llama_dir(head_dim=32, hidden=64, tied=False))
    golden = load_file(GOLDEN / "logits.safetensors")
    logits = model.logits(golden["tokens"], Lora.load(GOLDEN))[-8:]
    # the floor is for a torch.randn whose last bit differs on another CPU
    assert distance(logits, golden["logits"]) < 1e-5 * golden["logits"].abs().max().item()


@pytest.mark.parametrize("modules", [*PRESETS, "down_proj", "k_proj, gate_proj"])
def test_saved_adapter_is_the_same_adapter(tiny_llama_dir, tmp_path, modules):
    model = Llama.from_pretrained(tiny_llama_dir())
    lora = random_lora(model, modules, rslora=True)
    lora.save(tmp_path / "adapter", base="somewhere")
    again = Lora.load(tmp_path / "adapter")
    assert torch.equal(again.params, lora.params) and again.slots == lora.slots
    assert again.config.module_names() == lora.config.module_names()
    assert again.config.scale == lora.config.scale
    assert torch.equal(model.logits(TOKENS, again), model.logits(TOKENS, lora))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere"
    with pytest.raises(ValueError, match="exists already"):
        lora.save(tmp_path / "adapter")


def edited(tmp_path, change_config=None, change_tensors=None):
    """A copy of peft's adapter with changes to adapter_config.json and to its tensors."""
    path = tmp_path / "edited"
    shutil.copytree(GOLDEN, path)
    if change_config is not None:
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, **change_config}))
    if change_tensors is not None:
        tensors = load_file(path / "adapter_model.safetensors")
        change_tensors(tensors)
        save_file(tensors, path / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize(
    "setting",
    [
        {"peft_type": "LOHA"},
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["embed_tokens"]},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": 1},
        {"layers_pattern": "layers"},
        {"layer_replication": [[0, 2]]},
        {"target_parameters": ["w"]},
        {"trainable_token_indices": [1]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "mica"},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1, 2]},
        {"arrow_config": {"top_k": 2}},
        {"kasa_config": {"beta": 1e-4}},
        {"monteclora_config": {"mc_samples": 2}},
        {"use_bdlora": {"nblocks": 2}},
        {"something_new": 1},
        {"r": "8"},
        {"r": True},
        {"lora_alpha": None},
        {"lora_dropout": "0.1"},
        {"use_rslora": "false"},
    ],
    ids=lambda setting: "-".join(f"{key}={value}" for key, value in setting.items()),
)
def test_setting_is_refused_by_name(tmp_path, setting):
    path = edited(tmp_path, setting)
    (name,) = setting
    with pytest.raises(ValueError, match=rf"adapter_config.json: {name} (=|is) "):
        Lora.load(path)


@pytest.mark.parametrize(
    "setting",
    [
        {"target_modules": r".*proj"},
        {"target_modules": ["q_proj"]},  # the tensors tell
        {"init_lora_weights": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}},
        {"velora_config": {"num_groups": 4}},
        {"something_new": None, "another": False, "third": {}},
    ],
)
def test_setting_that_changes_nothing_is_accepted(tmp_path, setting):
    assert torch.equal(Lora.load(edited(tmp_path, setting)).params, Lora.load(GOLDEN).params)


STEM = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(f"{STEM}.lora_B.weight"), f"{STEM}.lora_B.weight is missing"),
        (lambda t: t.pop(f"{STEM}.lora_A.weight"), f"{STEM}.lora_A.weight is missing"),
        (
            lambda t: t.update({f"{STEM}.lora_A.weight": torch.zeros(5, 64)}),
            f"{STEM}.lora_A.weight is (5, 64)",
        ),
        (
            lambda t: t.update({f"{STEM}.lora_A.weight": torch.zeros(3)}),
            f"{STEM}.lora_A.weight is (3,)",
        ),
        (
            lambda t: t.update({f"{STEM}.lora_magnitude_vector": torch.zeros(3)}),
            f"{STEM}.lora_magnitude_vector is not",
        ),
        (
            lambda t: t.update({f"{STEM}.lora_B.bias": torch.zeros(96)}),
            f"{STEM}.lora_B.bias is not",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 64)}),
            "base_model.model.lm_head.lora_A.weight is not",
        ),
        (lambda t: t.clear(), "holds no tensor"),
    ],
)
def test_tensor_is_refused_by_name(tmp_path, change, named):
    path = edited(tmp_path, change_tensors=change)
    with pytest.raises(ValueError) as refusal:
        Lora.load(path)
    assert str(path / "adapter_model.safetensors") in str(refusal.value)
    assert named in str(refusal.value)


def test_adapter_files_are_refused(tmp_path, tiny_llama_dir):
    path = edited(tmp_path)
    weights, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    for text, named in [("{", "is not JSON"), ("[]", "list")]:
        config.write_text(text)
        with pytest.raises(ValueError, match=f"adapter_config.json .*{named}"):
            Lora.load(path)
    shutil.copyfile(GOLDEN / config.name, config)
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match="adapter_model.safetensors cannot be read"):
        Lora.load(path)
    weights.rename(path / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin is a pickle and is never opened"):
        Lora.load(path)


@pytest.mark.parametrize("other", [{"layers": 3}, {"layers": 1}, {"heads": 8}])
def test_adapter_of_another_model_is_refused(tiny_llama_dir, tmp_path, other):
    lora = random_lora(Llama.from_pretrained(tiny_llama_dir()), "all")
    lora.save(tmp_path / "adapter")
    stranger = tiny_llama_dir(**other)
    with pytest.raises(ValueError, match="made for another model"):
        Llama.from_pretrained(stranger).logits(TOKENS, Lora.load(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="made for another model"):
        merge(stranger, Lora.load(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- merged on disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_merged_weights(tiny_llama_dir, tmp_path, dtype, shards):
    """W + s B A, rounded once; everything else, names and other files, as it was."""
    source = tiny_llama_dir(dtype=dtype, tied=False, tokenizer=True)
    if shards > 1:
        source = split(source, tmp_path / "shards", shards)
    lora = random_lora(Llama.from_pretrained(source), "qv", rslora=True)
    out = tmp_path / "deep" / "merged"
    merge(source, lora, out)
    adapter = {name: view.double() for name, view in lora.views(lora.params).items()}
    weights = sorted(source.glob("*.safetensors"))
    assert len(weights) == shards
    for file in weights:
        old, new = load_file(file), load_file(out / file.name)
        assert old.keys() == new.keys()
        for name, weight in old.items():
            stem = name.removesuffix(".weight")
            if f"{stem}.lora_A.weight" not in adapter:
                assert torch.equal(new[name], weight), name
                continue
            delta = adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            want = (weight.double() + 16 / 8**0.5 * delta).to(dtype)
            assert new[name].dtype == dtype and not torch.equal(new[name], weight)
            # where fp32 falls on the other side of a rounding boundary, the last bit differs
            differ = (new[name] != want).double().mean().item()
            assert differ < (0.3 if dtype == torch.float32 else 1e-3), f"{name}: {differ:.1%}"
            torch.testing.assert_close(new[name], want, rtol=torch.finfo(dtype).eps, atol=1e-7)
    others = {f.name for f in source.iterdir() if f.suffix != ".safetensors"}
    assert all((out / n).read_bytes() == (source / n).read_bytes() for n in others)
    (tmp_path / "plain").touch()
    rights = {file.stat().st_mode for file in (*out.iterdir(), tmp_path / "plain")}
    assert len(rights) == 1, "a merged model can be read by whoever may read other files"
    if dtype == torch.float32:
        merged, apart = Llama.from_pretrained(out), Llama.from_pretrained(source)
        assert distance(merged.logits(TOKENS), apart.logits(TOKENS, lora)) < 2e-5


def test_merge_that_overflows_is_refused(tiny_llama_dir, tmp_path):
    source = tiny_llama_dir(dtype=torch.float16)
    lora = random_lora(Llama.from_pretrained(source), "qv")
    lora.params.mul_(1e4)
    with pytest.raises(ValueError, match="q_proj.weight merged is not finite in torch.float16"):
        merge(source, lora, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from model.weights import rewrite_checkpoint

left = int(sys.argv[3])
def change(name, tensor):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return tensor

rewrite_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), change)
"""


def test_killed_merge_leaves_nothing_under_the_name(tiny_llama_dir, tmp_path):
    """At several moments, shards written already included; the next run is not disturbed."""
    source, out = split(tiny_llama_dir(), tmp_path / "source", 3), tmp_path / "out"
    tensors = sum(len(load_file(file)) for file in source.glob("*.safetensors"))
    for moment in (0, tensors // 2, tensors - 1):
        command = [sys.executable, "-c", KILLED, str(source), str(out), str(moment)]
        assert subprocess.run(command, cwd=ROOT).returncode == -9
        assert not out.exists()
    rewrite_checkpoint(source, out, lambda name, tensor: tensor)
    assert torch.equal(
        Llama.from_pretrained(out).logits(TOKENS), Llama.from_pretrained(source).logits(TOKENS)
    )


def test_merge_script(tiny_llama_dir, tmp_path):
    source, out = tiny_llama_dir(), tmp_path / "merged"
    model = Llama.from_pretrained(source)
    lora = random_lora(model, "all")
    lora.save(tmp_path / "adapter")

    def run(model_dir):
        paths = ["--model", model_dir, "--adapter", tmp_path / "adapter", "--out", out]
        command = [sys.executable, ROOT / "scripts" / "merge.py", *paths]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    refused = run(tmp_path / "nowhere")
    assert refused.returncode == 1 and refused.stderr.startswith("merge: ")
    assert "nowhere/config.json is missing" in refused.stderr and not out.exists()
    done = run(source)
    assert done.returncode == 0 and "q_proj, k_proj, v_proj, o_proj" in done.stdout, done.stderr
    assert distance(Llama.from_pretrained(out).logits(TOKENS), model.logits(TOKENS, lora)) < 2e-5
    before = (out / "model.safetensors").stat()
    refused = run(source)
    assert refused.returncode == 1 and f"{out} exists already" in refused.stderr
    assert (out / "model.safetensors").stat() == before


# ---- merged in memory, for sampling


def assert_merges_for_sampling(path, modules, tokens):
    """No further from the fp64 truth than twice the unmerged logits; the base is not touched."""
    model, exact = Llama.from_pretrained(path), Llama.from_pretrained(path, dtype=torch.float64)
    lora = random_lora(model, modules)
    again = Lora(lora.config, {name: shape for name, (_, shape) in lora.slots.items()})
    again.params.copy_(lora.params)
    truth = exact.logits(tokens, again)
    before = {name: weight.clone() for name, weight in model.weights.items()}
    sampling, left = model.for_sampling(lora)
    assert left is None, "on a CPU in fp32 the adapter is merged"
    merged = sampling.logits(tokens)
    error, unit = distance(merged, truth), distance(model.logits(tokens, lora), truth)
    print(f"merged for sampling: error {error:.3g}, unmerged {unit:.3g}")
    assert error <= 2 * unit
    assert distance(merged, model.logits(tokens)) > 1e-2, "the adapter did nothing"
    assert all(torch.equal(weight, before[name]) for name, weight in model.weights.items())


@pytest.mark.parametrize("modules", [*PRESETS, "k_proj,down_proj"])
def test_adapter_merged_for_sampling(tiny_llama_dir, modules):
    assert_merges_for_sampling(tiny_llama_dir(tied=False), modules, TOKENS)


def test_smollm2_adapter_merged_for_sampling(smollm2_dir):
    tokens = json.loads(SMOLLM2.read_text())["tokens"][:48]
    assert_merges_for_sampling(smollm2_dir, "all", tokens)
