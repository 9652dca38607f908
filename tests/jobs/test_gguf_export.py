"""Export to GGUF: the way back gives the same model, and llama.cpp computes what we compute."""

from __future__ import annotations

import functools
import json
import runpy
import shutil
import sys
import tempfile
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from engine.jobs.gguf_export import export_adapter, export_model
from engine.jobs.gguf_import import import_gguf
from kernels.registry import TORCH
from model.config import LlamaConfig
from model.llama import Llama
from model.lora import Lora, LoraConfig, a_name, b_name
from model.peft_format import load_lora, save_lora
from model.tokenizer import load_tokenizer
from model.trained_chat import TrainedChat
from tests.helpers.adapters import random_lora
from tests.helpers.llama_dirs import CHATML, write_llama
from tests.helpers.tokenizer_dirs import train_sentencepiece, write_json

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra `demo`)")
tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers (extra `bpe`)")

from tests.helpers.gguf_files import texts, vocabulary, write_gguf  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
IDS = [0, 5, 40, 99, 260, 3, 17, 8, 200, 31]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@functools.cache
def tokenizer_files(pre: str) -> dict[str, bytes]:
    """The files of a byte-level BPE tokenizer cut like `pre`, as an import writes them."""
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small"
        small.mkdir()
        write_llama(small, vocab=len(vocabulary()))
        write_gguf(Path(folder) / "m.gguf", small, pre=pre)
        import_gguf(Path(folder) / "m.gguf", Path(folder) / "out")
        files = {file.name: file.read_bytes() for file in (Path(folder) / "out").iterdir()}
    for name in ("config.json", "model.safetensors", "gguf_import.json"):
        del files[name]
    return files


def bpe_dir(tiny_llama_dir, pre: str = "llama-bpe", **settings) -> Path:
    """A random model with a byte-level BPE tokenizer cut like `pre`, and a chat template."""
    settings = {"head_dim": 32, "kv_heads": 2, "tied": False} | settings
    model = tiny_llama_dir(vocab=len(vocabulary()), **settings)
    for name, content in tokenizer_files(pre).items():
        (model / name).write_bytes(content)
    (model / "chat_template.jinja").write_text(CHATML)
    config = json.loads((model / "config.json").read_text())
    write_json(model / "config.json", config | {"bos_token_id": 0, "eos_token_id": 1})
    return model


def opened(path: Path) -> Llama:
    """The model with torch's operations, which need no check of kernels for these widths."""
    return Llama.from_pretrained(path, ops=TORCH)


def rounded(weight: np.ndarray, kind: str) -> np.ndarray:
    """The numbers of a matrix in a GGUF of that kind, by the definition of its format."""
    if weight.ndim == 1 or kind == "F32":
        return weight
    if kind == "F16":
        return weight.astype(np.float16).astype(np.float32)
    if kind == "BF16":
        return torch.from_numpy(weight).bfloat16().float().numpy()
    blocks = weight.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)  # fp32
    inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    scaled = blocks * inverse
    # half away from zero, as C's roundf
    numbers = np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))
    return (numbers * scale.astype(np.float16).astype(np.float32)).reshape(weight.shape)


# The way out and back


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_an_exported_model_comes_back_as_its_format_rounds_it(tmp_path, tiny_llama_dir, kind):
    model = bpe_dir(tiny_llama_dir, intermediate=96 if kind == "Q8_0" else 100)
    formats = export_model(model, None, tmp_path / "m.gguf", kind)
    assert set(formats.values()) == {"F32", kind}
    import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    for name, weight in load_file(model / "model.safetensors").items():
        np.testing.assert_array_equal(found[name], rounded(weight, kind), err_msg=name)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        expected = json.loads((model / name).read_text())
        assert json.loads((tmp_path / "back" / name).read_text()) == expected, name
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == CHATML


def test_rows_that_q8_0_cannot_cut_are_f16(tmp_path, tiny_llama_dir):
    model = bpe_dir(tiny_llama_dir, intermediate=100)
    formats = export_model(model, None, tmp_path / "m.gguf", "Q8_0")
    assert {name for name, kind in formats.items() if kind == "F16"} == {
        "blk.0.ffn_down.weight",
        "blk.1.ffn_down.weight",
    }


@pytest.mark.parametrize("scaling", [LLAMA3, {"rope_type": "linear", "factor": 2.5}])
def test_rope_scaling_and_tied_embeddings_come_back(tmp_path, tiny_llama_dir, scaling):
    model = bpe_dir(
        tiny_llama_dir, tied=True, head_dim=64, rope_scaling=scaling, rope_theta=500000.0
    )
    export_model(model, None, tmp_path / "m.gguf", "F32")
    import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    back = LlamaConfig.from_dir(tmp_path / "back")
    assert back == LlamaConfig.from_dir(model)
    ours = opened(model).logits(IDS)
    assert torch.equal(opened(tmp_path / "back").logits(IDS), ours)


@pytest.mark.parametrize("pre", ["smollm", "smaug-bpe", "gpt-2", "qwen2"])
def test_the_way_of_cutting_text_is_recognised(tmp_path, tiny_llama_dir, pre):
    model = bpe_dir(tiny_llama_dir, pre)
    export_model(model, None, tmp_path / "m.gguf", "F16")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == pre


def test_an_adapter_is_merged_at_its_strength(tmp_path, tiny_llama_dir):
    path = bpe_dir(tiny_llama_dir)
    model = opened(path)
    lora = random_lora(model, "all").scaled(0.5)
    export_model(path, lora, tmp_path / "m.gguf", "F32")
    import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    merged = opened(tmp_path / "back").logits(IDS)
    expected = model.logits(IDS, lora)
    assert (merged - expected).abs().max() < 2e-5
    assert (merged - model.logits(IDS)).abs().max() > 1e-2, "the adapter did nothing"


# Other families than Llama

FAMILIES = {  # model_type -> settings, way of cutting text, architecture in llama.cpp
    "mistral": ({"sliding_window": 256}, "llama-bpe", "llama"),
    "qwen2": ({"tied": True}, "qwen2", "qwen2"),
    "qwen3": ({"hidden": 96, "rope_theta": 1e6}, "qwen2", "qwen3"),
    "smollm3": ({"layers": 5, "rope_theta": 2e6}, "smaug-bpe", "smollm3"),
}


def family_dir(tiny_llama_dir, family: str) -> Path:
    settings, pre, _ = FAMILIES[family]
    return bpe_dir(tiny_llama_dir, pre, model_type=family, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_another_family_comes_back_as_it_was(tmp_path, tiny_llama_dir, family):
    model = family_dir(tiny_llama_dir, family)
    export_model(model, None, tmp_path / "m.gguf", "F32")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    architecture = FAMILIES[family][2]
    assert fields["general.architecture"].contents() == architecture
    import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    expected = load_file(model / "model.safetensors")
    assert set(found) == set(expected)
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)
    # a window is stated as the context: llama.cpp has no key for it in a llama
    assert LlamaConfig.from_dir(tmp_path / "back") == replace(LlamaConfig.from_dir(model), window=0)
    back, original = load_tokenizer(tmp_path / "back"), load_tokenizer(model)
    assert [back.encode(text) for text in texts()] == [original.encode(text) for text in texts()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "smollm3", "layers": 5, "no_rope_layers": [0, 1, 1, 1, 0]},
            r"the layers \[0, 4\] are not rotated; .* every fourth layer unrotated, \[3\]",
        ),
        ({"model_type": "qwen3", "rope_scaling": LLAMA3}, "rope type 'llama3' in a qwen3"),
    ],
    ids=["unrotated layers", "rope type"],
)
def test_arithmetic_that_llama_cpp_has_not_is_refused(tmp_path, tiny_llama_dir, settings, message):
    model = bpe_dir(tiny_llama_dir, **settings)
    with pytest.raises(ValueError, match=message):
        export_model(model, None, tmp_path / "m.gguf", "F32")
    lora = random_lora(opened(model), "qv")
    with pytest.raises(ValueError, match=message):
        export_adapter(lora, model, tmp_path / "m.gguf", "F32")
    assert not (tmp_path / "m.gguf").exists()


# What cannot be exported


def change_json(file: Path, change) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def no_space_marks(document: dict) -> None:
    document["normalizer"] = {"type": "NFC"}


def strips(document: dict) -> None:
    document["added_tokens"][0]["lstrip"] = True


def no_merges(document: dict) -> None:
    document["model"]["merges"] = []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_space_marks, "cuts text in a way that has no name here"),
        (strips, "sets lstrip, which a GGUF cannot state"),
        (no_merges, "BPE vocabularies with merges"),
    ],
)
def test_tokenizers_that_a_gguf_cannot_state_are_refused(tmp_path, tiny_llama_dir, change, message):
    model = bpe_dir(tiny_llama_dir)
    change_json(model / "tokenizer.json", change)
    with pytest.raises(ValueError, match=message):
        export_model(model, None, tmp_path / "m.gguf", "F16")
    assert not (tmp_path / "m.gguf").exists()


def test_numbers_beyond_a_format_are_refused_and_nothing_is_left(tmp_path, tiny_llama_dir):
    model = bpe_dir(tiny_llama_dir)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(tensors, model / "model.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="blk.1.ffn_up.weight holds 1e.05, beyond F16's largest"):
        export_model(model, None, tmp_path / "m.gguf", "F16")
    assert sorted(tmp_path.iterdir()) == before
    export_model(model, None, tmp_path / "m.gguf", "BF16")
    with pytest.raises(ValueError, match="m.gguf exists already"):
        export_model(model, None, tmp_path / "m.gguf", "BF16")


def test_tokens_without_a_row_are_named_and_rows_without_a_token_too(
    tmp_path, tiny_llama_dir, capsys
):
    model = bpe_dir(tiny_llama_dir)
    size = len(vocabulary())
    change_json(
        model / "tokenizer_config.json",
        lambda settings: settings["added_tokens_decoder"].update(
            {str(size): {"content": "[extra]", "special": True}}
        ),
    )
    export_model(model, None, tmp_path / "m.gguf", "F16")
    assert "1 tokens of" in capsys.readouterr().out
    larger = tiny_llama_dir(vocab=size + 3)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model / name, larger)
    export_model(larger, None, tmp_path / "larger.gguf", "F16")
    tokens = gguf.GGUFReader(tmp_path / "larger.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert tokens[size:] == ["[extra]", f"[PAD{size + 1}]", f"[PAD{size + 2}]"]


# llama.cpp


def in_llama_cpp(run_llama_cpp, path: Path, **job) -> tuple[dict, np.ndarray]:
    """llama.cpp's answer and its logits (T, V) after IDS."""
    answer, arrays = run_llama_cpp(path, {"texts": texts(), "ids": [IDS], **job})
    return answer, arrays["logits0"]


@pytest.mark.peers
@pytest.mark.parametrize("pre", ["llama-bpe", "smollm", "gpt-2"])
def test_llama_cpp_computes_our_logits_and_cuts_text_as_we_do(
    tmp_path, tiny_llama_dir, run_llama_cpp, pre
):
    """F32: logits to rounding. Grouped queries, Llama 3's rope scaling, an end token of turns."""
    model = bpe_dir(tiny_llama_dir, pre, head_dim=64, rope_theta=500000.0, rope_scaling=LLAMA3)
    export_model(model, None, tmp_path / "m.gguf", "F32")
    answer, logits = in_llama_cpp(run_llama_cpp, tmp_path / "m.gguf")
    ours = opened(model).logits(IDS).numpy()
    assert np.abs(logits - ours).max() <= 2e-5 * np.abs(ours).max()
    tokenizer = load_tokenizer(model)
    assert answer["tokens"] == [tokenizer.encode(text) for text in texts()]
    assert (answer["bos"], answer["eos"], answer["ends"]) == (0, 1, [1, 2])
    assert answer["add_bos"] == tokenizer.add_bos
    chats = ["<|begin|>the<|turn|> 12\n<|end|>"]
    answer, _ = run_llama_cpp(tmp_path / "m.gguf", {"texts": chats, "special": True})
    assert answer["tokens"] == [tokenizer.encode_template(chats[0])]


@pytest.mark.peers
@pytest.mark.parametrize(("kind", "allowed"), [("F16", 2e-3), ("BF16", 1e-2), ("Q8_0", 4e-2)])
def test_llama_cpp_computes_a_smaller_format_as_closely_as_its_products_are(
    tmp_path, tiny_llama_dir, run_llama_cpp, kind, allowed
):
    """It rounds the inputs of a product to the format of the matrix too; ours computes in fp32."""
    model = bpe_dir(tiny_llama_dir)
    export_model(model, None, tmp_path / "m.gguf", kind)
    import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    _, logits = in_llama_cpp(run_llama_cpp, tmp_path / "m.gguf")
    ours = opened(tmp_path / "back").logits(IDS).numpy()
    assert np.abs(logits - ours).max() <= allowed * np.abs(ours).max()


@pytest.mark.peers
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_every_family_and_its_adapters_as_we_do(
    tmp_path, tiny_llama_dir, run_llama_cpp, family
):
    """F32: the model's logits, and those with an adapter beside it and merged into it.

    So the order of the rows of q and k, in files that are exported and imported, is llama.cpp's.
    Text that is not in NFC is left out of the comparison for Qwen: llama.cpp does not normalise.
    """
    path = family_dir(tiny_llama_dir, family)
    model = opened(path)
    export_model(path, None, tmp_path / "m.gguf", "F32")
    answer, logits = in_llama_cpp(run_llama_cpp, tmp_path / "m.gguf")
    plain = model.logits(IDS).numpy()
    assert np.abs(logits - plain).max() <= 2e-5 * np.abs(plain).max()
    tokenizer = load_tokenizer(path)
    for text, theirs in zip(texts(), answer["tokens"], strict=True):
        if "qwen" not in family or unicodedata.is_normalized("NFC", text):
            assert theirs == tokenizer.encode(text), repr(text)
    lora = random_lora(model, "all")
    export_adapter(lora, path, tmp_path / "lora.gguf", "F32")
    export_model(path, lora, tmp_path / "merged.gguf", "F32")
    ours = model.logits(IDS, lora).numpy()
    assert np.abs(ours - plain).max() > 1e-2, "the adapter did nothing"
    for file, adapter in (("m.gguf", str(tmp_path / "lora.gguf")), ("merged.gguf", None)):
        _, logits = in_llama_cpp(run_llama_cpp, tmp_path / file, lora=adapter)
        assert np.abs(logits - ours).max() <= 5e-5 * np.abs(ours).max(), file


@pytest.mark.peers
def test_llama_cpp_answers_greedily_as_the_demo_model_does(tmp_path, smollm2_dir, run_llama_cpp):
    """The real model, in F32: 40 tokens after a prompt in its chat format.

    They are those of tests/golden, which tests/model/test_llama.py compares with our own and with
    transformers' greedy text. llama.cpp is given prompt and answer: the likeliest token after each
    must be the next one.
    """
    golden = json.loads((ROOT / "tests" / "golden" / "smollm2.json").read_text())
    prompt, answer = golden["prompts"][0], golden["continuations"][0][:40]
    export_model(smollm2_dir, None, tmp_path / "demo.gguf", "F32")
    _, arrays = run_llama_cpp(tmp_path / "demo.gguf", {"ids": [prompt + answer]})
    (tmp_path / "demo.gguf").unlink()  # pytest would keep half a gigabyte
    likeliest = arrays["logits0"].argmax(axis=1)  # (T,)
    assert likeliest[len(prompt) - 1 : -1].tolist() == answer


def odd_adapter(path: Path, model: Llama) -> Lora:
    """An adapter with a rank and an alpha of its own for some modules, one layer left out."""
    shapes = {}
    draw = np.random.default_rng(3)
    config = model.config
    outputs = {
        "q_proj": config.num_heads * config.head_dim,
        "k_proj": config.num_kv_heads * config.head_dim,
    }
    for module, rank in (("q_proj", 4), ("k_proj", 2)):
        name = f"base_model.model.model.layers.1.self_attn.{module}"
        a = draw.standard_normal((rank, config.hidden_size)) * 0.1
        b = draw.standard_normal((outputs[module], rank)) * 0.1
        shapes[f"{name}.lora_A.weight"] = a.astype(np.float32)
        shapes[f"{name}.lora_B.weight"] = b.astype(np.float32)
    path.mkdir()
    save_file(shapes, path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "k_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"k_proj": 20},
    }
    write_json(path / "adapter_config.json", settings)
    return load_lora(path)


ADAPTERS = {
    "plain": LoraConfig(rank=4, alpha=12.0, modules="all"),
    "rslora": LoraConfig(rank=4, alpha=12.0, modules="q_proj,k_proj,down_proj", rslora=True),
    "patterns": None,
}


@pytest.mark.peers
@pytest.mark.parametrize(
    ("case", "strength"), [("plain", 1.0), ("plain", 0.25), ("rslora", 1.0), ("patterns", 0.25)]
)
def test_llama_cpp_adds_an_exported_adapter_as_we_do(
    tmp_path, tiny_llama_dir, run_llama_cpp, case, strength
):
    path = bpe_dir(tiny_llama_dir)
    model = opened(path)
    if case == "patterns":
        lora = odd_adapter(tmp_path / "adapter", model)
    else:
        lora = Lora.init(ADAPTERS[case], model.config, "cpu", torch.float32)
        lora.params.normal_(std=0.1)
    lora = lora.scaled(strength)
    export_model(path, None, tmp_path / "m.gguf", "F32")
    export_adapter(lora, path, tmp_path / "lora.gguf", "F32")
    _, logits = in_llama_cpp(run_llama_cpp, tmp_path / "m.gguf", lora=str(tmp_path / "lora.gguf"))
    ours = model.logits(IDS, lora).numpy()
    assert np.abs(logits - ours).max() <= 5e-5 * np.abs(ours).max()
    assert np.abs(logits - model.logits(IDS).numpy()).max() > 1e-2, "the adapter did nothing"


@pytest.mark.parametrize("rslora", [False, True])
def test_matrices_of_an_exported_adapter_are_as_trained(tmp_path, tiny_llama_dir, rslora):
    """Where one alpha says the scale of all modules, no number of A or B is changed."""
    path = bpe_dir(tiny_llama_dir)
    lora = random_lora(opened(path), "all", rslora=rslora).scaled(0.5)
    export_adapter(lora, path, tmp_path / "lora.gguf", "F32")
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(stored) == 2 * 7 * 2
    for part, name in (("a", a_name), ("b", b_name)):
        trained = lora.view(lora.params, name("model.layers.1.mlp.down_proj")).numpy()
        np.testing.assert_array_equal(stored[f"blk.1.ffn_down.weight.lora_{part}"], trained)


def converted(directory: Path) -> None:
    """Beside tokenizer.model: the tokenizer.json that its conversion gives, with all its merges."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
    vocab = {model.id_to_piece(id): id for id in range(model.get_piece_size())}
    merges = []
    scores = [model.get_score(id) for id in vocab.values()]
    for piece, _ in sorted(zip(vocab, scores, strict=True), key=lambda item: -item[1]):
        if len(piece) < 2 or model.is_byte(vocab[piece]) or model.is_control(vocab[piece]):
            continue
        for cut in range(1, len(piece)):
            if piece[:cut] in vocab and piece[cut:] in vocab:
                merges.append((piece[:cut], piece[cut:]))
    bpe = tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = tokenizers.Tokenizer(bpe)
    step = tokenizers.normalizers
    made.normalizer = step.Sequence([step.Prepend("▁"), step.Replace(" ", "▁")])
    back = tokenizers.decoders
    made.decoder = back.Sequence(
        [back.Replace("▁", " "), back.ByteFallback(), back.Fuse(), back.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(directory / "tokenizer.json"))


def sentencepiece_dir(tiny_llama_dir, kind: str) -> Path:
    """A random Llama with a sentencepiece vocabulary, as one file or the other."""
    model = tiny_llama_dir(vocab=360, bos_token_id=1, eos_token_id=2)
    train_sentencepiece(model)
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
    write_json(model / "tokenizer_config.json", settings)
    if kind == "tokenizer.json":
        converted(model)
        (model / "tokenizer.model").unlink()
    return model


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_sentencepiece_vocabularies_come_back(tmp_path, tiny_llama_dir, kind):
    model = sentencepiece_dir(tiny_llama_dir, kind)
    export_model(model, None, tmp_path / "m.gguf", "F32")
    import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    original, back = load_tokenizer(model), load_tokenizer(tmp_path / "back")
    for text in texts():
        # the two kinds of file differ in a text that begins with a space, ours as transformers'
        if not text.startswith(" "):
            assert back.encode(text) == original.encode(text), repr(text)
    assert (back.bos_id, back.eos_id, back.special) == (1, 2, original.special)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_llama_cpp_cuts_text_as_a_sentencepiece_vocabulary_does(
    tmp_path, tiny_llama_dir, run_llama_cpp, kind
):
    """Apart from texts that begin with a space, where it adds another."""
    model = sentencepiece_dir(tiny_llama_dir, kind)
    export_model(model, None, tmp_path / "m.gguf", "F32")
    answer, logits = in_llama_cpp(run_llama_cpp, tmp_path / "m.gguf")
    tokenizer = load_tokenizer(model)
    for text, theirs in zip(texts(), answer["tokens"], strict=True):
        if not text.startswith(" "):
            assert theirs == tokenizer.encode(text), repr(text)
    ours = opened(model).logits(IDS).numpy()
    assert np.abs(logits - ours).max() <= 2e-5 * np.abs(ours).max()
    assert (answer["bos"], answer["eos"], answer["add_bos"]) == (1, 2, tokenizer.add_bos)


def test_merges_that_are_no_sentencepiece_models_are_refused(tmp_path, tiny_llama_dir):
    """A pair that makes a piece and is not among the merges: scores would merge it."""
    model = sentencepiece_dir(tiny_llama_dir, "tokenizer.json")
    change_json(model / "tokenizer.json", lambda document: document["model"]["merges"].pop(5))
    with pytest.raises(ValueError, match="not those of a sentencepiece model"):
        export_model(model, None, tmp_path / "m.gguf", "F32")


# The script


@pytest.fixture
def script(monkeypatch, capsys):
    """`script(*flags)` runs scripts/export_gguf.py in this process: exit code, printed text."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["export_gguf.py", *map(str, flags)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / "export_gguf.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out + err

    return run


def test_the_script_writes_model_and_adapter_and_refuses_what_it_cannot(
    tmp_path, tiny_llama_dir, script
):
    path = bpe_dir(tiny_llama_dir)
    adapter = tmp_path / "adapter"
    save_lora(random_lora(opened(path), "qv"), adapter)
    both = ("--model", path, "--adapter", adapter)
    merged = tmp_path / "merged.gguf"
    code, said = script(*both, "--type", "q8_0", "--out", merged)
    assert code == 0 and "5 tensors in F32, 16 tensors in Q8_0" in said, said
    code, said = script(*both, "--adapter-only", "--out", tmp_path / "lora.gguf")
    assert code == 0, said
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    assert reader.fields["adapter.type"].contents() == "lora"
    names = {tensor.name for tensor in reader.tensors}
    assert "blk.1.attn_v.weight.lora_b" in names and len(names) == 8
    for flags, reason in (
        ((*both, "--out", merged), "exists already"),
        (
            (*both, "--adapter-only", "--scale", "0", "--out", tmp_path / "zero.gguf"),
            "at scale 0 the adapter does nothing",
        ),
        (("--model", path, "--adapter-only", "--out", "x"), "--adapter-only needs --adapter"),
        (("--model", path, "--scale", "0.5", "--out", "x"), "no --adapter to scale"),
    ):
        code, said = script(*flags)
        assert code == 2 and reason in said, said
    assert not (tmp_path / "zero.gguf").exists()


def test_the_chat_format_of_the_training_is_written(tmp_path, tiny_llama_dir, script):
    """Template and end token, as the merged directory of scripts/merge.py has them."""
    path = bpe_dir(tiny_llama_dir)
    adapter = tmp_path / "adapter"
    save_lora(random_lora(opened(path), "qv"), adapter)
    write_json(path / "generation_config.json", {"eos_token_id": 1})
    template = "{{ messages[0]['content'] }}<|turn|>"
    record = TrainedChat("alpaca", template, "0" * 64, 2, "<|turn|>", "Be kind.")
    record.write(adapter)
    out = tmp_path / "m.gguf"
    code, said = script("--model", path, "--adapter", adapter, "--out", out)
    assert code == 0 and "trained with the system message 'Be kind.'" in said, said
    fields = gguf.GGUFReader(out).fields
    assert fields["tokenizer.chat_template"].contents() == template
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 2
