"""Loading a checkpoint: which files and settings are refused, and how much memory it takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.runtime.run_record import model_fingerprint
from model.chat import Chat
from model.config import LlamaConfig
from model.llama import Llama
from model.rope import cos_sin_table, inverse_frequencies
from model.sampling_weights import for_sampling
from model.tokenizer import load_tokenizer
from tests.helpers import programs
from tests.helpers.shards import split

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
QUERY = "model.layers.1.self_attn.q_proj.weight"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
ROTARY = "model.layers.0.self_attn.rotary_emb."


def edit_config(path, changes):
    """Rewrite config.json; a change to `...` removes the key."""
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    file.write_text(json.dumps(kept))


def edit_weights(path, change):
    """Rewrite model.safetensors after `change(tensors)`."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def assert_refused(path, *named):
    """Loading raises a ValueError whose message has each of `named`."""
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
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "'mixtral'"),
        ({"model_type": "mistral"}, "expected MistralForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": "LlamaForCausalLM"}, "architectures LlamaForCausalLM"),
        ({"model_type": ...}, "model_type None"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"attention_bias": "false"}, "attention_bias is 'false'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "'gelu'"),
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
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta 500000.0, rope_theta 10000.0"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "'llama3' and type 'linear'"),
        ({"rope_scaling": {"factor": 4.0}}, "factor 4.0 without a type"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "got nan"),
        ({"hidden_size": ...}, "hidden_size is None"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": 10**400}, "vocab_size is 1000"),
        ({"max_position_embeddings": float("nan")}, "max_position_embeddings is nan"),
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


def test_config_that_is_not_an_object_is_refused(tiny_llama_dir):
    path = tiny_llama_dir()
    (path / "config.json").write_text('{"model_type": "llama",')
    assert_refused(path, str(path / "config.json"), "is not JSON")
    (path / "config.json").write_text("[]")
    assert_refused(path, str(path / "config.json"), "list")
    (path / "config.json").write_text('{"a":' * 100_000)
    assert_refused(path, str(path / "config.json"), "nested too deeply")
    (path / "config.json").unlink()
    assert_refused(path, str(path / "config.json"), "is missing")


def test_rope_is_read_as_transformers_reads_it(tiny_llama_dir):
    """An original context beside the scaling goes before one inside it; null means absent."""
    path = tiny_llama_dir(rope_scaling=LLAMA3, original_max_position_embeddings=64)
    assert LlamaConfig.from_dir(path).rope_scaling["original_max_position_embeddings"] == 64
    path = tiny_llama_dir()
    edit_config(path, {"rope_scaling": None, "rope_parameters": None, "head_dim": None})
    assert LlamaConfig.from_dir(path).rope_scaling == {"rope_type": "default"}


TWICE = {  # the rotation in the old and in the new spelling, with the same meaning
    "rope_theta": 5e5,
    "rope_scaling": LLAMA3,
    "rope_parameters": LLAMA3 | {"factor": 4, "rope_theta": 500000},
}


def test_rope_spelled_twice_is_compared_by_meaning(tiny_llama_dir):
    """Exporters write both on purpose; 4 is 4.0, `type` is `rope_type`, theta may be in one."""
    once = LlamaConfig.from_dir(tiny_llama_dir(rope_theta=5e5, rope_scaling=LLAMA3))
    assert LlamaConfig.from_dir(tiny_llama_dir(**TWICE)) == once
    with_type = LLAMA3 | {"type": "llama3"}
    del with_type["rope_type"]
    path = tiny_llama_dir(**TWICE | {"rope_scaling": with_type})
    assert LlamaConfig.from_dir(path) == once
    for key, value in [("factor", 8.0), ("high_freq_factor", 2.0)]:
        other = LLAMA3 | {key: value}
        path = tiny_llama_dir(**TWICE | {"rope_scaling": other})
        assert_refused(path, "rope_parameters", "rope_scaling", f"'{key}': {value}", "disagree")
    path = tiny_llama_dir(**TWICE | {"rope_theta": 1e4})
    assert_refused(path, "rope_parameters.rope_theta 500000, rope_theta 10000.0")


LINEAR = {"max_position_embeddings": 256, "rope_scaling": {"type": "linear", "factor": 4.0}}


@pytest.mark.parametrize(
    ("config", "named", "longest"),
    [
        ({}, None, 256),
        ({"max_sequence_length": 1024}, None, 1024),  # vicuna-v1.5-16k, sixteen times smaller
        ({}, 1024, 1024),
        ({}, 1e30, 256),  # transformers' way to write that there is no limit
        ({}, 512, 512),
        ({}, 100, 256),
        ({"max_sequence_length": 4096}, None, 1024),  # no more than the factor makes
        ({"max_sequence_length": "1024"}, True, 256),
        ({"rope_scaling": None, "max_sequence_length": 1024}, 1024, 256),
    ],
)
def test_context_of_a_linearly_scaled_model(tiny_llama_dir, config, named, longest):
    path = tiny_llama_dir(**{**LINEAR, **config})
    if named is not None:
        (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": named}))
    model = Llama.from_pretrained(path)
    assert model.config.max_position == longest
    assert model.logits(torch.zeros(longest, dtype=torch.int64)).shape == (longest, 320)
    with pytest.raises(ValueError, match=f"of at most {longest}"):
        model.logits(torch.zeros(longest + 1, dtype=torch.int64))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_stored_under_a_tied_config_is_used_where_it_differs(tiny_llama_dir, capsys, dtype):
    """Equal to the embeddings it is one matrix with them; else it is the head, with a message."""
    path = tiny_llama_dir(tied=True, dtype=dtype)
    tied = Llama.from_pretrained(path)
    edit_weights(path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    again = Llama.from_pretrained(path)
    assert again.weights["head"] is again.weights["embed"] and again.config == tied.config
    assert capsys.readouterr().out == ""

    edit_weights(path, lambda tensors: tensors[HEAD].neg_())
    other = Llama.from_pretrained(path)
    said = capsys.readouterr().out
    assert str(path / "config.json") in said and '"tie_word_embeddings": false' in said
    assert not other.config.tie_embeddings
    assert torch.equal(other.weights["head"], -tied.weights["embed"])
    assert torch.equal(other.weights["embed"], tied.weights["embed"])
    expected = -tied.logits(torch.arange(9))
    assert torch.equal(other.logits(torch.arange(9)), expected)
    packed, _ = for_sampling(other)  # where a tied model has one packed matrix for both
    assert (packed.logits(torch.arange(9)) - expected).abs().max() < 1e-4
    edit_config(path, {"tie_word_embeddings": False})
    assert Llama.from_pretrained(path).config == other.config and capsys.readouterr().out == ""


def test_a_tied_matrix_may_be_stored_as_the_head(tiny_llama_dir):
    """transformers ties to whichever of the two is there."""
    path = tiny_llama_dir(tied=True)
    expected = Llama.from_pretrained(path).logits(torch.arange(9))
    edit_weights(path, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    model = Llama.from_pretrained(path)
    assert model.config.tie_embeddings
    assert torch.equal(model.logits(torch.arange(9)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scaling", [None, LLAMA3, LINEAR["rope_scaling"]])
def test_rotary_tables_that_are_stored_must_be_the_configs(tiny_llama_dir, dtype, scaling):
    """Old files carry them, rounded or not; of linear scaling the table was stored unscaled."""
    path = tiny_llama_dir(rope_scaling=scaling)
    config = LlamaConfig.from_dir(path)
    plain = LlamaConfig.from_dir(tiny_llama_dir())
    expected = Llama.from_pretrained(path).logits(torch.arange(9))
    cos, sin = cos_sin_table(config, 512, "cpu", torch.float32).chunk(2, dim=1)
    cos_cached = torch.cat((cos, cos), dim=1)[None, None]  # (1, 1, positions, d)
    sin_cached = sin.clone()  # (positions, d/2)

    def store(**tables):
        """Put rotary tables into the checkpoint."""
        named = {ROTARY + kind: table.to(dtype) for kind, table in tables.items()}
        edit_weights(path, lambda tensors: tensors.update(named))

    accepted = [inverse_frequencies(config)]
    if scaling is LINEAR["rope_scaling"]:
        accepted.append(inverse_frequencies(plain))
    for inv_freq in accepted:
        store(inv_freq=inv_freq, cos_cached=cos_cached, sin_cached=sin_cached)
        assert torch.equal(Llama.from_pretrained(path).logits(torch.arange(9)), expected)
    right = {"inv_freq": accepted[-1], "cos_cached": cos_cached, "sin_cached": sin_cached}
    other_theta = LlamaConfig.from_dir(tiny_llama_dir(rope_theta=2e4))
    other_frequencies = inverse_frequencies(other_theta) if scaling is None else torch.zeros(8)
    wrong_tables = [
        ("inv_freq", other_frequencies),
        ("cos_cached", -cos_cached),
        ("sin_cached", torch.full_like(sin, torch.nan)),
        ("inv_freq", torch.ones(9)),  # of another length
    ]
    for kind, wrong in wrong_tables:
        store(**{kind: wrong})
        assert_refused(path, str(path / WEIGHTS), ROTARY + kind, "another rotation")
        store(**{kind: right[kind]})


QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def test_quantization_config_beside_plain_weights_is_ignored(tiny_llama_dir, capsys):
    """BF16 tensors under the usual names are no quantised model, whatever config.json says."""
    path = tiny_llama_dir(dtype=torch.bfloat16)
    plain = Llama.from_pretrained(path)
    for quantised in (QUANTISED, "awq"):
        edit_config(path, {"quantization_config": quantised})
        model = Llama.from_pretrained(path)
        assert model.config == plain.config
        assert torch.equal(model.logits(torch.arange(9)), plain.logits(torch.arange(9)))
        assert "delete quantization_config" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({QUERY: torch.zeros(2048, 1, dtype=torch.uint8)}),
        lambda t: t.update({f"{QUERY}.absmax": torch.zeros(32)}),
        lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)}),
        lambda t: t.update({QUERY.replace("weight", "qweight"): t.pop(QUERY).int()}),
        lambda t: t.pop(QUERY),
    ],
    ids=["packed", "absmax", "float8", "qweight", "missing"],
)
def test_quantised_weights_are_refused_as_such(tiny_llama_dir, change):
    path = tiny_llama_dir(quantization_config=QUANTISED)
    edit_weights(path, change)
    assert_refused(path, str(path), "the checkpoint is quantised (bitsandbytes)", "q_proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [QUERY, EMBEDDING, "model.norm.weight", HEAD])
def test_nan_and_infinity_are_refused_by_the_tensors_name(tiny_llama_dir, name, value):
    path = tiny_llama_dir(tied=False, dtype=torch.bfloat16)
    edit_weights(path, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    assert_refused(path, str(path / WEIGHTS), f"{name} holds 1 numbers that are NaN or infinite")


def test_large_finite_numbers_are_accepted(tiny_llama_dir):
    """Their sum is infinite, but none of them is."""
    path = tiny_llama_dir()
    edit_weights(path, lambda tensors: tensors[EMBEDDING].fill_(3e38))
    Llama.from_pretrained(path)


IN_TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from engine.runtime.distributed import start
from model.llama import Llama

world = start()
for name in sys.argv[1:]:
    try:
        model = Llama.from_pretrained(name, shard=True)
        found = f"{model.config.tie_embeddings} {model.logits(torch.arange(9)).sum().item():.5g}"
    except ValueError as error:
        found = str(error)
    Path(name, f"rank-{world.rank}").write_text(found)
"""


def test_sharded_weights_are_checked_in_every_process(tiny_llama_dir, tmp_path):
    """A stored head is used; a NaN in the rows of one process stops both."""
    other = tiny_llama_dir(tied=True)
    broken = tiny_llama_dir(tied=False)
    edit_weights(other, lambda tensors: tensors.update({HEAD: -tensors[EMBEDDING]}))
    edit_weights(broken, lambda tensors: tensors[QUERY][0].fill_(torch.nan))
    (tmp_path / "job.py").write_text(IN_TWO_PROCESSES)
    done = programs.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(tmp_path / "job.py"), str(other), str(broken)],
        cwd=ROOT,
        kind="sharded",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    total = Llama.from_pretrained(other).logits(torch.arange(9)).sum().item()
    for rank in range(2):
        tied, found = (other / f"rank-{rank}").read_text().split()
        assert tied == "False" and float(found) == pytest.approx(total, rel=1e-3)
    messages = [(broken / f"rank-{rank}").read_text() for rank in range(2)]
    assert QUERY in messages[0] and "NaN" in messages[0], messages
    assert "another process of the job found a fault" in messages[1], messages


@pytest.mark.peers
def test_contradictions_are_resolved_as_in_transformers(tiny_llama_dir, run_peer, tmp_path):
    other = tiny_llama_dir(tied=True)
    alone = tiny_llama_dir(tied=True)
    same = tiny_llama_dir(tied=True)
    edit_weights(other, lambda tensors: tensors.update({HEAD: -tensors[EMBEDDING]}))
    edit_weights(alone, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    edit_weights(same, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    long = tiny_llama_dir(**LINEAR, max_sequence_length=1024)
    dirs = {"other": other, "alone": alone, "same": same, "long": long}
    dirs["twice"] = tiny_llama_dir(**TWICE)
    tokens = torch.randint(320, (900,), generator=torch.Generator().manual_seed(2)).tolist()
    jobs = {}
    for name, path in dirs.items():
        count = 900 if name == "long" else 40
        keep = list(range(count - 8, count))
        jobs[name] = {"dir": str(path), "tokens": tokens[:count], "keep": keep}
    (tmp_path / "jobs.json").write_text(json.dumps({"logits": jobs}))
    run_peer("logits_peer.py", tmp_path / "jobs.json", tmp_path / "out.safetensors")
    theirs = load_file(tmp_path / "out.safetensors")
    for name, path in dirs.items():
        model = Llama.from_pretrained(path, dtype=torch.float64)
        error = model.logits(jobs[name]["tokens"])[-8:] - theirs[f"{name}/fp64"]
        print(f"{name}: {error.abs().max().item():.3g} from transformers")
        assert error.abs().max() < 1e-9


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
    for name, content in broken.items():
        file.write_bytes(content)
        words = "is an HTML page" if name == "a web page" else "cannot be read as safetensors"
        assert_refused(path, str(file), words)


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 538090408\n"
)


def open_everything(path):
    """Everything a script reads of a model directory."""
    Llama.from_pretrained(path)
    Chat.from_dir(path, load_tokenizer(path))


@pytest.mark.parametrize("kind", ["pointer", "page", "pipe", "directory"])
@pytest.mark.parametrize(
    "name",
    [
        WEIGHTS,
        "model-00002-of-00003.safetensors",
        INDEX,
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
    ],
)
def test_every_reader_names_a_broken_download(tiny_llama_dir, tmp_path, name, kind):
    """A Git LFS pointer above all: git clone without Git LFS writes them without a warning."""
    path = tiny_llama_dir(tokenizer=True)
    if "-of-" in name or name == INDEX:
        path = split(path, tmp_path / "shards", 3)
    if name == "tokenizer.model":
        (path / "tokenizer.json").unlink()
    (path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "directory":
        (path / name).mkdir()
    else:
        (path / name).write_text(POINTER if kind == "pointer" else "<!DOCTYPE html><html></html>")
    words = {"pointer": "Git LFS pointer", "page": "HTML page", "pipe": "pipe or a device"}
    with pytest.raises(ValueError) as refusal:
        open_everything(path)
    assert f"{path / name} is " in str(refusal.value)
    assert words.get(kind, "is a directory") in str(refusal.value)


@pytest.mark.parametrize("name", ["../m.safetensors", "/m.safetensors", "p/m.safetensors", "..", 3])
def test_an_index_may_only_name_files_beside_it(tiny_llama_dir, tmp_path, name):
    path = split(tiny_llama_dir(), tmp_path / "shards", 2)
    table = json.loads((path / INDEX).read_text())
    table["weight_map"][QUERY] = name
    (path / INDEX).write_text(json.dumps(table))
    assert_refused(path, str(path / INDEX), QUERY, repr(name), "plain name of a file")


@pytest.mark.parametrize(
    "name", ["config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"]
)
def test_links_out_of_a_checkpoint_are_refused(tiny_llama_dir, tmp_path, name):
    """Links out of the directory are refused; the Hugging Face cache consists of links."""
    path = tiny_llama_dir(tokenizer=True)
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name} is a link out of its directory, to .*elsewhere"):
        open_everything(path)
    with pytest.raises(ValueError, match="is a link out of its directory"):
        load_tokenizer(path)

    (path / name).unlink()
    (tmp_path / "elsewhere").rename(path / "inside")
    (path / name).symlink_to("inside")
    open_everything(path)
    (tmp_path / "linked").symlink_to(path)
    open_everything(tmp_path / "linked")

    cache = tmp_path / "models--some--model"
    snapshot, blobs = cache / "snapshots" / "0123abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for n, file in enumerate(sorted(path.iterdir())):
        if file.name != "inside":
            shutil.copyfile(file, blobs / f"{n:040x}")
            (snapshot / file.name).symlink_to(f"../../blobs/{n:040x}")
    open_everything(snapshot)
    elsewhere = tmp_path / "download"  # as huggingface_hub made them for large files
    elsewhere.mkdir()
    for file in snapshot.iterdir():
        (elsewhere / file.name).symlink_to(file.resolve())
    open_everything(elsewhere)


def test_a_pipe_beside_the_weights_is_not_waited_for(tiny_llama_dir):
    path = tiny_llama_dir()
    before = model_fingerprint(path)
    os.mkfifo(path / "x.safetensors")
    assert model_fingerprint(path) == before


def test_pickles_are_never_opened(tiny_llama_dir):
    path = tiny_llama_dir()
    (path / WEIGHTS).rename(path / "pytorch_model.bin")
    assert_refused(path, str(path), "pytorch_model.bin", "pickle")
    (path / "pytorch_model.bin").unlink()
    assert_refused(path, str(path), "no weights")


def test_broken_shards_are_refused(tiny_llama_dir, tmp_path):
    path = split(tiny_llama_dir(), tmp_path / "sharded", 3)
    index = path / INDEX
    table = index.read_text()
    second = path / "model-00002-of-00003.safetensors"
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


def test_float16_as_the_models_dtype_is_refused(tiny_llama_dir):
    with pytest.raises(ValueError, match="float16"):
        Llama.from_pretrained(tiny_llama_dir(), dtype=torch.float16)


# ---- tokens


@pytest.mark.parametrize("tokens", [[0, 320], [-1, 5]])
def test_ids_outside_the_vocabulary_are_refused(tiny_llama_dir, tokens):
    """A negative id would silently count from the end of the embeddings."""
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
        for line in status:
            if line.startswith(field):
                return int(line.split()[1])

torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # torch's own memory is not the model's
before = kilobytes("VmRSS")
model = Llama.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]), ops=TORCH)
after = kilobytes("VmHWM")
storages = {w.untyped_storage().data_ptr(): w.nbytes for w in model.weights.values()}
print(1024 * (after - before), sum(storages.values()))
"""


def test_loading_takes_under_1_2_times_the_models_memory(smollm2_dir, tmp_path, request):
    """The peak above the start of the process, for each dtype that the weights are stored in."""
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
        peak_text, size_text = done.stdout.split()
        peak = int(peak_text)
        size = int(size_text)
        print(f"{path.name} as {dtype}: peak {peak / 1e6:.0f} MB, model {size / 1e6:.0f} MB")
        assert size == 134_515_008 * (4 if dtype == "float32" else 2)
        assert peak < 1.2 * size
