"""Loading a checkpoint: what is refused, by which name, and how much memory it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import LlamaConfig
from model.llama import Llama
from tests.shards import split

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "model.safetensors"
QUERY = "model.layers.1.self_attn.q_proj.weight"


def edit_config(path, changes):
    """Rewrite config.json; a change to `...` removes the key."""
    file = path / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_weights(path, change):
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def assert_refused(path, *named):
    """ValueError that says each of `named`, before any weight is read."""
    with pytest.raises(ValueError) as refusal:
        Llama.from_pretrained(path)
    for words in named:
        assert words in str(refusal.value), f"{words!r} is not in: {refusal.value}"


# ---- config.json

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "'mistral'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": "LlamaForCausalLM"}, "architectures LlamaForCausalLM"),
        ({"model_type": ...}, "model_type None"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": "awq"}, "awq"),
        ({"rope_scaling": YARN}, "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ({"rope_parameters": [1.0]}, "rope_parameters is [1.0]"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "got True"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": "1"}}, "low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "not below high_freq_factor"),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
            "rope_parameters",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"hidden_size": ...}, "hidden_size is None"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 3}, "3 key/value heads"),
        ({"head_dim": 15}, "size 15"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_config_is_refused(tiny_llama_dir, changes, named):
    path = tiny_llama_dir()
    edit_config(path, changes)
    assert_refused(path, str(path / "config.json"), named)


def test_config_that_is_no_object_is_refused(tiny_llama_dir):
    path = tiny_llama_dir()
    (path / "config.json").write_text('{"model_type": "llama",')
    assert_refused(path, str(path / "config.json"), "is not JSON")
    (path / "config.json").write_text("[]")
    assert_refused(path, str(path / "config.json"), "list")
    (path / "config.json").unlink()
    assert_refused(path, str(path / "config.json"), "is missing")


def test_rope_is_read_as_transformers_reads_it(tiny_llama_dir):
    """An original context beside the scaling goes before one inside it; null means absent."""
    path = tiny_llama_dir(rope_scaling=LLAMA3, original_max_position_embeddings=64)
    assert LlamaConfig.from_dir(path).rope_scaling["original_max_position_embeddings"] == 64
    path = tiny_llama_dir()
    edit_config(path, {"rope_scaling": None, "rope_parameters": None, "head_dim": None})
    assert LlamaConfig.from_dir(path).rope_scaling == {"rope_type": "default"}


# ---- tensors


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(QUERY), "missing"),
        (lambda t: t.update({QUERY: t[QUERY][:-1].clone()}), "(63, 64)"),
        (lambda t: t.update({QUERY: t[QUERY].flatten()}), "(4096,)"),
        (lambda t: t.update({QUERY: t[QUERY].to(torch.int8)}), "I8"),
        (lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)}), "F8_E4M3"),
    ],
    ids=["missing", "misshapen", "flat", "int8", "float8"],
)
def test_tensor_is_refused(tiny_llama_dir, change, named):
    path = tiny_llama_dir()
    edit_weights(path, change)
    assert_refused(path, str(path / WEIGHTS), QUERY, named)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "lm_head.bias"],
)
def test_unexpected_tensor_is_refused(tiny_llama_dir, name):
    path = tiny_llama_dir(tied=False)
    edit_weights(path, lambda tensors: tensors.update({name: torch.zeros(64)}))
    assert_refused(path, str(path / WEIGHTS), name)


def test_untied_model_without_a_head_is_refused(tiny_llama_dir):
    path = tiny_llama_dir(tied=True)
    edit_config(path, {"tie_word_embeddings": False})
    assert_refused(path, str(path / WEIGHTS), "lm_head.weight")


def test_what_follows_from_the_config_may_be_stored_too(tiny_llama_dir):
    """Old files carry rotary tables; a tied one may repeat the embeddings as its head."""
    path = tiny_llama_dir(tied=True)
    want = Llama.from_pretrained(path).logits(torch.arange(9))
    extra = {
        "lm_head.weight": torch.zeros(320, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    edit_weights(path, lambda tensors: tensors.update(extra))
    assert torch.equal(Llama.from_pretrained(path).logits(torch.arange(9)), want)


# ---- files


def test_corrupted_files_are_refused(tiny_llama_dir):
    path = tiny_llama_dir()
    file = path / WEIGHTS
    whole = file.read_bytes()
    broken = {
        "length of the header": b"\xff" * 8 + whole[8:],
        "header": whole[:8] + b"#" + whole[9:],
        "cut in the data": whole[:-1000],
        "cut in the header": whole[:100],
        "empty": b"",
        "a web page": b"<!DOCTYPE html><html><body>404: Not Found</body></html>",
    }
    for content in broken.values():
        file.write_bytes(content)
        assert_refused(path, str(file), "cannot be read as safetensors")


def test_pickles_are_never_opened(tiny_llama_dir):
    path = tiny_llama_dir()
    (path / WEIGHTS).rename(path / "pytorch_model.bin")
    assert_refused(path, str(path), "pytorch_model.bin", "pickle")
    (path / "pytorch_model.bin").unlink()
    assert_refused(path, str(path), "no weights")


def test_broken_shards_are_refused(tiny_llama_dir, tmp_path):
    path = split(tiny_llama_dir(), tmp_path / "sharded", 3)
    index = path / "model.safetensors.index.json"
    table, second = index.read_text(), path / "model-00002-of-00003.safetensors"
    for text, named in [("{", "is not JSON"), ("[]", "holds a list"), ("{}", "weight_map")]:
        index.write_text(text)
        assert_refused(path, str(index), named)
    index.write_text(table)
    content = second.read_bytes()
    second.write_bytes(content[:-8])
    assert_refused(path, str(second), "cannot be read")
    second.unlink()
    assert_refused(path, str(second), "is missing")
    save_file(load_file(path / "model-00001-of-00003.safetensors"), second)
    assert_refused(path, str(second), "model-00001-of-00003.safetensors", "is in both")


def test_model_safetensors_is_read_alone(tiny_llama_dir):
    """Beside it may lie an adapter, or other layouts of the same weights."""
    path = tiny_llama_dir()
    save_file({"tok_embeddings.weight": torch.zeros(2)}, path / "consolidated.safetensors")
    Llama.from_pretrained(path)


def test_dtype_is_refused(tiny_llama_dir):
    with pytest.raises(ValueError, match="float16"):
        Llama.from_pretrained(tiny_llama_dir(), dtype=torch.float16)


# ---- tokens


@pytest.mark.parametrize("tokens", [[0, 320], [-1, 5]])
def test_ids_outside_the_vocabulary_are_refused(tiny_llama_dir, tokens):
    """A negative id would count from the end of the embeddings, and nobody would notice."""
    with pytest.raises(ValueError, match="0 to 319"):
        Llama.from_pretrained(tiny_llama_dir()).logits(torch.tensor(tokens))


def test_sequence_longer_than_the_model_was_made_for_is_refused(tiny_llama_dir):
    with pytest.raises(ValueError, match="513"):
        Llama.from_pretrained(tiny_llama_dir()).logits(torch.zeros(513, dtype=torch.int64))


def test_logits_of_several_rows_are_refused(tiny_llama_dir):
    with pytest.raises(ValueError, match="one sequence"):
        Llama.from_pretrained(tiny_llama_dir()).logits(torch.zeros(2, 3, dtype=torch.int64))


def test_no_token_gives_no_logits(tiny_llama_dir):
    assert Llama.from_pretrained(tiny_llama_dir()).logits([]).shape == (0, 320)


# ---- memory

PROBE = """
import sys
import torch
from kernels.registry import TORCH  # "auto" may check kernels first, which is not loading
from model.llama import Llama

def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # torch's own memory is not the model's
before = kilobytes("VmRSS")
model = Llama.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]), ops=TORCH)
after = kilobytes("VmHWM")
storages = {w.untyped_storage().data_ptr(): w.nbytes for w in model.weights.values()}
print(1024 * (after - before), sum(storages.values()))
"""


def test_memory_while_loading(smollm2_dir, tmp_path, request):
    """The peak over the start is under 1.2 times the model, whatever it is stored as."""
    if not Path("/proc/self/status").exists():
        pytest.skip("/proc is absent")
    sharded = split(smollm2_dir, tmp_path / "sharded", 3, torch.bfloat16)
    request.addfinalizer(lambda: shutil.rmtree(sharded))  # pytest would keep it
    for path, dtype in [(smollm2_dir, "float32"), (sharded, "float32"), (sharded, "bfloat16")]:
        done = subprocess.run(
            [sys.executable, "-c", PROBE, str(path), dtype],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        peak, size = map(int, done.stdout.split())
        print(f"{path.name} as {dtype}: peak {peak / 1e6:.0f} MB, model {size / 1e6:.0f} MB")
        assert size == 134_515_008 * (4 if dtype == "float32" else 2)
        assert peak < 1.2 * size
