"""Adapters: the same numbers as in peft, both ways; reading, writing and refusing adapters.

`peers` tests ask peft itself. tests/golden/peft holds an adapter that peft wrote and the logits it
computed with it. To make it anew:

    UPDATE_GOLDEN=1 python -m pytest tests/model/test_lora.py -m peers
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.adamw import AdamW
from kernels.packed import Packed
from kernels.registry import TORCH
from model.layout import GROUPS
from model.llama import Llama
from model.lora import PRESETS
from model.merge import merge
from model.peft_format import load_lora, save_lora
from model.sampling_weights import for_sampling, restore_weights
from model.tape import Tape
from model.weights import PlainWeights
from tests.helpers.adapters import TOKENS, ask_peft, distance, random_lora

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "peft"
UPDATE = os.environ.get("UPDATE_GOLDEN") == "1"
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


def add_gradient(model, lora, rows):
    """Add to lora.grads the gradient of the summed loss of all response tokens, rows packed."""
    tokens: list[int] = []
    targets: list[int] = []
    select: list[int] = []  # the positions that predict the targets
    for ids, prompt_length in rows:
        first = len(tokens) + prompt_length - 1
        select += range(first, len(tokens) + len(ids) - 1)
        targets += ids[prompt_length:]
        tokens += ids
    tape = Tape("selective")
    packed = Packed.from_lengths([len(ids) for ids, _ in rows])
    hidden = model.forward(torch.tensor(tokens), packed, lora=lora, tape=tape)
    _, dselected = model.ops.linear_cross_entropy(
        hidden[select], model.weights["head"], torch.tensor(targets)
    )
    dhidden = torch.zeros_like(hidden).index_copy_(0, torch.tensor(select), dselected)
    model.backward(dhidden, tape)


def train(model, lora, rows, steps, lr=1e-3):
    """A few steps as engine/train/step.py takes them.

    The gradient of the last step stays in lora.grads.
    """
    m = torch.zeros_like(lora.params)
    v = torch.zeros_like(lora.params)
    scale = 1 / sum(len(ids) for ids, _ in rows)
    for step in range(1, steps + 1):
        lora.grads.zero_()
        add_gradient(model, lora, rows)
        scalars = AdamW().scalars(lr, step, scale, "cpu")
        model.ops.adamw_(lora.params, lora.grads, m, v, scalars, AdamW())
    return lora


def random_rows(vocab=320):
    """Rows of (ids, length of the prompt)."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for length in (9, 30, 14):
        ids = torch.randint(vocab, (length,), generator=generator).tolist()
        rows.append((ids, length // 3))
    return rows


def real_rows(path):
    """CONVERSATIONS in ChatML as rows of (ids, length of the prompt)."""
    tokenizers = pytest.importorskip("tokenizers", reason="extra `bpe`")
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    rows = []
    for question, answer in CONVERSATIONS:
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt_ids = tokenizer.encode(prompt).ids
        answer_ids = tokenizer.encode(f"{answer}<|im_end|>").ids
        rows.append((prompt_ids + answer_ids, len(prompt_ids)))
    return rows


def assert_as_close_as_peft(name, logits, theirs):
    """No further from the fp64 truth than twice peft's own fp32 logits."""
    truth = theirs[f"{name}/fp64"]
    error = distance(logits, truth)
    unit = distance(theirs[f"{name}/fp32"], truth)
    print(f"{name}: error {error:.3g}, peft's own {unit:.3g}")
    assert error <= 2 * unit, f"{name}: error {error:.3g}, peft's own {unit:.3g}"


def assert_same_gradients(name, ours, theirs, tolerance):
    """The gradients of all tensors differ by less than `tolerance` times their largest element."""
    prefix = f"{name}/grad/base_model.model."
    expected = {n.removeprefix(prefix): t for n, t in theirs.items() if n.startswith(prefix)}
    assert expected.keys() == ours.keys()
    worst = 0.0
    for tensor, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 0, f"{tensor} has no gradient: the test would prove nothing"
        error = distance(ours[tensor], gradient) / scale
        assert error < tolerance, f"{name} {tensor}: relative error {error:.2g}"
        worst = max(worst, error)
    print(f"{name}: worst relative error of {len(expected)} gradients {worst:.3g}")


# ---- against peft itself


@pytest.mark.peers
def test_smollm2_gradients_and_logits_equal_pefts(smollm2_dir, run_peer, tmp_path):
    """Every tensor's gradient on four rows, then the logits after a step along it; tied head."""
    model = Llama.from_pretrained(smollm2_dir)
    rows = real_rows(smollm2_dir)
    all_ids = [token for ids, _ in rows for token in ids]
    tokens = all_ids[:100]
    gradients = {}
    logits = {}
    jobs = {"logits": {}, "gradients": {}}
    for modules in ("qv", "all"):
        lora = random_lora(model, modules)
        before = tmp_path / f"{modules}-before"
        after = tmp_path / f"{modules}-after"
        save_lora(lora, before, base=smollm2_dir)
        train(model, lora, rows, steps=1)
        save_lora(lora, after, base=smollm2_dir)
        gradients[modules] = lora.views(lora.grads.clone())
        logits[modules] = model.logits(torch.tensor(tokens), load_lora(after))
        jobs["gradients"][modules] = {
            "dir": smollm2_dir,
            "adapter": before,
            "rows": rows,
            "dtype": "float32",
        }
        jobs["logits"][modules] = {"dir": smollm2_dir, "adapter": after, "tokens": tokens}
    theirs = ask_peft(run_peer, tmp_path, **jobs)
    for modules in ("qv", "all"):
        assert_as_close_as_peft(modules, logits[modules], theirs)
        assert_same_gradients(modules, gradients[modules], theirs, tolerance=1e-4)


# Adapters that peft makes on a small model: name -> arguments of its LoraConfig
PLAIN = {
    "q,v": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "all-linear": {"target_modules": "all-linear", "r": 3, "lora_alpha": 7, "lora_dropout": 0.1},
    "pattern": {"target_modules": r".*\.(k_proj|down_proj)", "r": 2, "lora_alpha": 16},
    "rslora": {"target_modules": ["o_proj", "up_proj"], "r": 16, "use_rslora": True},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
    "ranks": {
        "target_modules": "all-linear",
        "r": 4,
        "lora_alpha": 7,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6, "v_proj": 9},
        "alpha_pattern": {"k_proj": 3, r"layers\.0\.self_attn\.v_proj": 40, "up_proj": 2.5},
    },
    "ranks-rslora": {
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "r": 4,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 5, "o_proj": 1},
    },
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "layer": {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "layers-by-pattern": {"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"},
    "layers-by-name": {"target_modules": ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
    "copies": {"target_modules": ["q_proj"], "save_embedding_layers": True},
}
PATTERNED = ("ranks", "ranks-rslora", "layers", "layer", "layers-by-pattern", "layers-by-name")
REFUSED = {
    "use_dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "trainable_token_indices": {"trainable_token_indices": [3]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
}


def assert_saved_and_merged(base, adapter, again):
    """A loaded adapter is saved as it was, bound or not, and merged it gives the same logits."""
    model = Llama.from_pretrained(base, dtype=torch.float64)
    lora = load_lora(adapter)
    logits = model.logits(TOKENS, lora)
    save_lora(lora, again)
    assert_same_files(adapter, again)
    merge(base, load_lora(again), again / "merged")
    merged = Llama.from_pretrained(again / "merged", dtype=torch.float64).logits(TOKENS)
    assert distance(merged, logits) < 2e-5
    assert distance(merged, model.logits(TOKENS)) > 1e-2
    single = Llama.from_pretrained(base)
    sampling, left = for_sampling(single, load_lora(again))
    assert left is None and distance(sampling.logits(TOKENS), logits) < 2e-5


def assert_same_files(one, other):
    """The same tensors, and the same settings of single modules."""
    tensors = load_file(one / "adapter_model.safetensors")
    saved = load_file(other / "adapter_model.safetensors")
    assert tensors.keys() == saved.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-6, atol=0, msg=name)
    settings = json.loads((one / "adapter_config.json").read_text())
    saved_settings = json.loads((other / "adapter_config.json").read_text())
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        assert (saved_settings.get(key) or None) == (settings.get(key) or None), key
    for key in ("target_modules", "layers_to_transform", "exclude_modules"):
        assert not settings.get(key) or saved_settings[key] == settings[key], key


@pytest.mark.peers
def test_small_adapters_give_the_same_numbers_in_peft(tiny_llama_dir, run_peer, tmp_path):
    """Ours in peft, and peft's here, where those that are not supported are refused by name."""
    path = tiny_llama_dir(head_dim=32, hidden=64, tied=False)
    model = Llama.from_pretrained(path)
    exact = Llama.from_pretrained(path, dtype=torch.float64)
    jobs = {"make": {}, "logits": {}, "gradients": {}}
    loras = {}
    gradients = {}
    place = {"dir": path}
    for modules in PRESETS:
        for rslora in (False, True):
            name = f"ours-{modules}-{'rslora' if rslora else 'lora'}"
            loras[name] = train(model, random_lora(model, modules, rslora), random_rows(), steps=3)
            save_lora(loras[name], tmp_path / name, base=path)
            here = {**place, "adapter": tmp_path / name}
            jobs["logits"][name] = {**here, "tokens": TOKENS}
            jobs["gradients"][name] = {**here, "rows": random_rows(), "dtype": "float64"}
            again = load_lora(tmp_path / name)
            exact.bind(again)
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
        logits = model.logits(TOKENS, loras.get(name) or load_lora(tmp_path / name))
        assert_as_close_as_peft(name, logits, theirs)
        logits64 = exact.logits(TOKENS, load_lora(tmp_path / name))
        assert distance(logits64, theirs[f"{name}/fp64"]) < 1e-11, f"{name}: another function"
        assert distance(logits, plain) > 1e-2, f"{name} does nothing: the test would prove nothing"
    assert torch.equal(model.logits(TOKENS, load_lora(tmp_path / "untrained")), plain)
    for name in PATTERNED:
        assert_saved_and_merged(path, tmp_path / name, tmp_path / f"{name}-again")
    for name in REFUSED:
        with pytest.raises(ValueError, match=rf"adapter_config.json: {name} = "):
            load_lora(tmp_path / name)
    if UPDATE:
        shutil.rmtree(GOLDEN, ignore_errors=True)
        GOLDEN.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(tmp_path / "all-linear" / file, GOLDEN / file)
        logits = {"tokens": torch.tensor(TOKENS), "logits": theirs["all-linear/fp64"][-8:].float()}
        save_file(logits, GOLDEN / "logits.safetensors")


# ---- reading and writing


def test_an_adapter_of_peft_gives_the_logits_that_peft_computed(tiny_llama_dir):
    model = Llama.from_pretrained(tiny_llama_dir(head_dim=32, hidden=64, tied=False))
    golden = load_file(GOLDEN / "logits.safetensors")
    logits = model.logits(golden["tokens"], load_lora(GOLDEN))[-8:]
    # the floor is for a torch.randn whose last bit differs on another CPU
    assert distance(logits, golden["logits"]) < 1e-5 * golden["logits"].abs().max().item()


@pytest.mark.parametrize("modules", [*PRESETS, "down_proj", "k_proj, gate_proj"])
def test_saved_adapter_is_the_same_adapter(tiny_llama_dir, tmp_path, modules):
    model = Llama.from_pretrained(tiny_llama_dir())
    lora = random_lora(model, modules, rslora=True)
    save_lora(lora, tmp_path / "adapter", base="somewhere")
    again = load_lora(tmp_path / "adapter")
    assert torch.equal(again.params, lora.params) and again.slots == lora.slots
    assert again.config.module_names() == lora.config.module_names()
    assert again.config.scale == lora.config.scale
    assert torch.equal(model.logits(TOKENS, again), model.logits(TOKENS, lora))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere"
    with pytest.raises(ValueError, match="exists already"):
        save_lora(lora, tmp_path / "adapter")


def test_a_base_in_the_hugging_face_cache_is_recorded_by_its_hub_id(tiny_llama_dir, tmp_path):
    lora = random_lora(Llama.from_pretrained(tiny_llama_dir(), ops=TORCH), "qv")
    commit = "0123abcd" * 5
    snapshot = f"/home/me/hub/models--org--tiny-1B/snapshots/{commit}"
    for base, name, revision in (
        (snapshot, "org/tiny-1B", commit),
        (f"{snapshot}/inner", f"{snapshot}/inner", None),
        ("models/mine", "models/mine", None),
    ):
        path = tmp_path / f"adapter-{len(base)}"
        save_lora(lora, path, base=base)
        config = json.loads((path / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config.get("revision")) == (name, revision)
        assert torch.equal(load_lora(path).params, lora.params)


def edited(tmp_path, change_config=None, change_tensors=None):
    """A copy of peft's adapter with changes to adapter_config.json and to its tensors."""
    path = tmp_path / "edited"
    shutil.copytree(GOLDEN, path)
    if change_config is not None:
        file = path / "adapter_config.json"
        config = json.loads(file.read_text()) | change_config
        file.write_text(json.dumps(config))
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
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": 2.0}},
        {"alpha_pattern": {"q_proj": float("nan")}},
        {"alpha_pattern": {"q_proj": "4"}},
        {"layers_to_transform": "1"},
        {"layers_to_transform": [True]},
        {"target_modules": {"q_proj": 1}},
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
        {"something_new": 0},
        {"something_new": 0.0},
        {"r": "8"},
        {"r": True},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 0},
        {"r": 0},
        {"r": 10**30},
        {"lora_dropout": float("nan")},
        {"lora_dropout": 1.5},
        {"lora_dropout": "0.1"},
        {"use_rslora": "false"},
    ],
    ids=lambda setting: "-".join(f"{key}={value}" for key, value in setting.items()),
)
def test_setting_is_refused_by_name(tmp_path, setting):
    path = edited(tmp_path, setting)
    (name,) = setting
    with pytest.raises(ValueError, match=rf"adapter_config.json: {name} (=|is) "):
        load_lora(path)


@pytest.mark.parametrize(
    "setting",
    [
        {"target_modules": r".*proj"},
        {"target_modules": ["q_proj"]},  # the tensors decide
        {"layers_to_transform": [0, 1]},  # all there are
        {"layers_pattern": "layers"},
        {"rank_pattern": {"nothing": 5}},
        {"init_lora_weights": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}},
        {"velora_config": {"num_groups": 4}},
        {"something_new": None, "another": False, "third": {}},
    ],
)
def test_setting_that_changes_nothing_is_accepted(tmp_path, setting):
    assert torch.equal(load_lora(edited(tmp_path, setting)).params, load_lora(GOLDEN).params)


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
        load_lora(path)
    assert str(path / "adapter_model.safetensors") in str(refusal.value)
    assert named in str(refusal.value)


def test_a_pattern_that_is_not_a_regular_expression_is_refused(tmp_path):
    for setting in ({"rank_pattern": {"q_(": 4}}, {"target_modules": "*"}):
        path = edited(tmp_path, setting)
        with pytest.raises(
            ValueError, match=r"adapter_config.json: .* is not a regular expression"
        ):
            load_lora(path)
        shutil.rmtree(path)


def peft_adapter(path, model, ranks, alphas, seed=0, **config):
    """A PEFT adapter written by hand; ranks and alphas: (layer, module) -> number.

    Returns W + alpha / rank B A of every adapted weight in fp64, by the weight's name.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(model / "model.safetensors")
    tensors = {}
    merged = {}
    for (layer, module), rank in ranks.items():
        stem = f"model.layers.{layer}.{module}"
        weight = weights[f"{stem}.weight"].double()  # (N, K)
        a = torch.randn(rank, weight.shape[1], generator=generator) / 8  # (r, K)
        b = torch.randn(weight.shape[0], rank, generator=generator) / 8  # (N, r)
        tensors[f"base_model.model.{stem}.lora_A.weight"] = a
        tensors[f"base_model.model.{stem}.lora_B.weight"] = b
        scale = alphas[layer, module] / rank
        merged[f"{stem}.weight"] = weight + scale * (b.double() @ a.double())
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return merged


def test_single_modules_may_have_their_own_rank_alpha_and_layers(tiny_llama_dir, tmp_path):
    """The logits are those of a model whose weights are the merged ones, in fp64."""
    path = tiny_llama_dir(layers=3, tied=False)
    q = "self_attn.q_proj"
    k = "self_attn.k_proj"
    v = "self_attn.v_proj"
    up = "mlp.up_proj"
    ranks = {(0, q): 2, (0, k): 4, (0, v): 9, (2, q): 2, (2, k): 4, (2, v): 4, (2, up): 4}
    alphas = dict.fromkeys(ranks, 8.0) | {(0, k): 3.0, (2, k): 3.0, (2, q): 5.0}
    settings = {
        "rank_pattern": {"q_proj": 2, r"model\.layers\.0\.self_attn\.v_proj": 9},
        "alpha_pattern": {"k_proj": 3, "2.self_attn.q_proj": 5.0},
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"],
        "exclude_modules": "model.layers.0.mlp.*",
        "layers_to_transform": [0, 2],
    }
    merged = peft_adapter(tmp_path / "adapter", path, ranks, alphas, **settings)
    exact = Llama.from_pretrained(path, dtype=torch.float64)
    lora = load_lora(tmp_path / "adapter")
    logits = exact.logits(TOKENS, lora)
    weights = {}
    for name, weight in load_file(path / "model.safetensors").items():
        weights[name] = merged.get(name, weight.double())
    assert_logits_of(exact, weights, logits)
    single = Llama.from_pretrained(path)
    assert distance(single.logits(TOKENS, load_lora(tmp_path / "adapter")), logits) < 1e-4
    assert_saved_and_merged(path, tmp_path / "adapter", tmp_path / "again")

    # the gradients of the zeros that fill lower ranks up are zero, so that they stay zeros
    add_gradient(exact, lora, random_rows())
    grads = lora.views(lora.grads)
    a_grad = grads["model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert a_grad.shape[0] == 9
    assert a_grad[:2].abs().max() > 0
    assert not a_grad[2:].any()
    b_grad = grads["model.layers.0.self_attn.k_proj.lora_B.weight"]
    assert b_grad[:, :4].abs().max() > 0
    assert not b_grad[:, 4:].any()


def assert_logits_of(model, weights, logits):
    """`logits` are those of `model` with other weights, by their names in a checkpoint, in fp64."""
    ours = PlainWeights(model.weights)
    for i in range(model.config.num_layers):
        for group, members in GROUPS.items():
            parts = [weights[f"model.layers.{i}.{member}.weight"] for member in members]
            ours[f"{i}.{group}"] = torch.cat(parts)
    other = Llama(model.config, ours, model.ops)
    assert distance(other.logits(TOKENS), logits) < 1e-11
    assert distance(model.logits(TOKENS), logits) > 1e-2, "the adapter does nothing"


def test_a_layer_missing_without_a_pattern_is_refused(tiny_llama_dir, tmp_path):
    """An adapter of two layers does not fit a model of three, unless its settings say so."""
    path = tiny_llama_dir(layers=3)
    q = "self_attn.q_proj"
    ranks = {(0, q): 4, (1, q): 4}
    model = Llama.from_pretrained(path)
    cases = {
        "list": {"target_modules": ["q_proj"]},
        "pattern": {"target_modules": r".*\.q_proj"},
        "none": {},
        "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 1, 2]},
        "two-layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]},
        "two-layers-by-pattern": {"target_modules": r".*layers\.[01]\.self_attn\.q_proj"},
        "excluded": {"target_modules": ["q_proj"], "exclude_modules": ["2.self_attn.q_proj"]},
    }
    for name, settings in cases.items():
        peft_adapter(tmp_path / name, path, ranks, dict.fromkeys(ranks, 8.0), **settings)
        lora = load_lora(tmp_path / name)
        if name in ("two-layers", "two-layers-by-pattern", "excluded"):
            assert distance(model.logits(TOKENS, lora), model.logits(TOKENS)) > 1e-2
            continue
        with pytest.raises(ValueError, match="layers.2.self_attn.q_proj.lora_A.weight is missing"):
            model.logits(TOKENS, lora)


@pytest.mark.parametrize("tied", [True, False])
def test_copies_of_the_base_embeddings_must_equal_them(tiny_llama_dir, tmp_path, capsys, tied):
    """peft's save_embedding_layers: equal copies are ignored with a message, others refused."""
    base = tiny_llama_dir(tied=tied)
    stored = load_file(base / "model.safetensors")
    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight"
    own = {embedding: stored[embedding], head: stored.get(head, stored[embedding]).clone()}
    q = "self_attn.q_proj"
    ranks = {(0, q): 4, (1, q): 4}
    where = tmp_path / "adapter"
    model = Llama.from_pretrained(base)

    def adapter(copies):
        shutil.rmtree(where, ignore_errors=True)
        peft_adapter(where, base, ranks, dict.fromkeys(ranks, 8.0))
        tensors = load_file(where / "adapter_model.safetensors")
        tensors |= {f"base_model.model.{name}": tensor for name, tensor in copies.items()}
        save_file(tensors, where / "adapter_model.safetensors")
        return load_lora(where)

    expected = model.logits(TOKENS, adapter({}))
    assert capsys.readouterr().out == ""
    half = {name: tensor.bfloat16() for name, tensor in own.items()}
    base_layer = {"lm_head.base_layer.weight": own[head]}
    for copies in (own, half, {head: own[head]}, base_layer):
        lora = adapter(copies)
        assert torch.equal(model.logits(TOKENS, lora), expected)
        assert f"holds an unchanged copy of the model's {head}" in capsys.readouterr().out
        sampling, _ = for_sampling(model, release=True)  # bound while the matrices are packed
        model.bind(load_lora(where))
        restore_weights(model)
        merge(base, adapter(copies), where / "merged")
        merged = load_file(where / "merged" / "model.safetensors")
        assert not any("lora" in name for name in merged)
    other = {embedding: own[embedding].clone()}
    other[embedding][300, 3] += 1e-3
    resized = {head: torch.cat((own[head], own[head][:2]))}
    for copies in (other, resized, {head: own[head][:, :-1].clone()}):
        (name,) = copies
        words = rf"adapter_model.safetensors: base_model.model.{name} .* is not the model's own"
        with pytest.raises(ValueError, match=words):
            model.logits(TOKENS, adapter(copies))
        with pytest.raises(ValueError, match=words):
            merge(base, adapter(copies), where / "merged")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(tmp_path, value):
    name = f"{STEM}.lora_B.weight"
    path = edited(tmp_path, change_tensors=lambda tensors: tensors[name][3].fill_(value))
    with pytest.raises(ValueError, match=f"{name} holds 3 numbers that are NaN or infinite"):
        load_lora(path)


def test_broken_adapter_downloads_are_named(tmp_path):
    """Git LFS pointers, and links out of the adapter's directory."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        path = edited(tmp_path)
        (path / name).rename(tmp_path / "elsewhere")
        (path / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=f"{name} is a link out of its directory"):
            load_lora(path)
        (path / name).unlink()
        (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer"):
            load_lora(path)
        shutil.rmtree(path)


def test_damaged_and_pickled_adapter_files_are_refused(tmp_path, tiny_llama_dir):
    path = edited(tmp_path)
    weights = path / "adapter_model.safetensors"
    config = path / "adapter_config.json"
    for text, named in [("{", "is not JSON"), ("[]", "list")]:
        config.write_text(text)
        with pytest.raises(ValueError, match=f"adapter_config.json .*{named}"):
            load_lora(path)
    shutil.copyfile(GOLDEN / config.name, config)
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match="adapter_model.safetensors cannot be read"):
        load_lora(path)
    weights.rename(path / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin is a pickle and is never opened"):
        load_lora(path)


@pytest.mark.parametrize("other", [{"layers": 3}, {"layers": 1}, {"heads": 8}])
def test_adapter_of_another_model_is_refused(tiny_llama_dir, tmp_path, other):
    lora = random_lora(Llama.from_pretrained(tiny_llama_dir()), "all")
    save_lora(lora, tmp_path / "adapter")
    stranger = tiny_llama_dir(**other)
    with pytest.raises(ValueError, match="made for another model"):
        Llama.from_pretrained(stranger).logits(TOKENS, load_lora(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="made for another model"):
        merge(stranger, load_lora(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
