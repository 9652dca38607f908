"""Import of sentencepiece vocabularies, of every quantisation and of files in several parts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file

from engine.jobs.gguf_import import import_gguf
from engine.jobs.sentencepiece_file import read_model
from model.tokenizer import load_tokenizer
from tests.helpers.tokenizer_dirs import train_sentencepiece, write_json

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra `demo`)")
pytest.importorskip("tokenizers", reason="needs the package tokenizers (extra `bpe`)")

from tests.helpers.gguf_files import (  # noqa: E402
    gguf_name,
    random_blocks,
    split_gguf,
    texts,
    vocabulary,
    write_gguf,
)

ROOT = Path(__file__).resolve().parents[2]


# Sentencepiece


def of_sentencepiece(directory: Path, **changes) -> dict:
    """The metadata of a GGUF for the tokenizer.model in `directory`."""
    model = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
    ids = range(model.get_piece_size())

    def kind(id: int) -> int:
        if model.is_unknown(id):
            return 2
        if model.is_control(id):
            return 3
        return 6 if model.is_byte(id) else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [model.id_to_piece(id) for id in ids],
        "tokenizer.ggml.scores": [model.get_score(id) for id in ids],
        "tokenizer.ggml.token_type": [kind(id) for id in ids],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.eot_token_id": None,
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        **changes,
    }


@pytest.fixture
def spm_dir(tmp_path) -> Path:
    """A directory with a tokenizer.model of 360 pieces and Llama 2's settings."""
    path = tmp_path / "spm"
    path.mkdir()
    train_sentencepiece(path)
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    return path


def test_a_sentencepiece_vocabulary_becomes_the_tokenizer_model_that_it_was_made_of(
    tmp_path, spm_dir, tiny_llama_dir
):
    """Ids of every text, decoding, bos and eos as with the original file."""
    write_gguf(tmp_path / "m.gguf", tiny_llama_dir(vocab=360), **of_sentencepiece(spm_dir))
    assert import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    original, imported = load_tokenizer(spm_dir), load_tokenizer(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    for text in texts():
        ids = original.encode(text)
        assert imported.encode(text) == ids
        assert imported.decode(ids) == original.decode(ids)
    chat = "<s>[INST] Hi </s> 12<unk>"
    assert imported.encode_template(chat) == original.encode_template(chat)
    for name in ("bos_id", "eos_id", "add_bos", "special", "vocab_size"):
        assert getattr(imported, name) == getattr(original, name), name


def test_added_tokens_and_settings_of_a_sentencepiece_gguf_are_kept(
    tmp_path, spm_dir, tiny_llama_dir
):
    stated = of_sentencepiece(spm_dir)
    for spelling, kind in (("<|im_end|>", 3), ("<tool>", 4), ("[PAD362]", 5)):
        stated["tokenizer.ggml.tokens"].append(spelling)
        stated["tokenizer.ggml.scores"].append(-1000.0)
        stated["tokenizer.ggml.token_type"].append(kind)
    stated["tokenizer.ggml.eot_token_id"] = 360
    stated["tokenizer.ggml.add_space_prefix"] = False
    stated["tokenizer.ggml.add_bos_token"] = False
    write_gguf(tmp_path / "m.gguf", tiny_llama_dir(vocab=363), **stated)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.encode_template("<|im_end|>") == [360]
    assert 360 not in tokenizer.encode("<|im_end|>"), "a user cannot forge it"
    assert 361 in tokenizer.encode("a <tool> b"), "an added token that is not special"
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    assert tokenizer.encode("a") == tokenizer.encode("a", continues=True), "no space before a text"
    assert tokenizer.add_bos is False
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 360]


DAMAGED = {
    "no unknown": ({"tokenizer.ggml.token_type": [1] * 360}, "0 tokens of type unknown"),
    "a byte short": ("tokenizer.ggml.token_type", 3, 1, "255 of type byte"),
    "twice": ("tokenizer.ggml.tokens", 300, "<s>", "spells two tokens the same way"),
    "fewer scores": ({"tokenizer.ggml.scores": [0.0] * 3}, "360 tokens with 3 scores"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_sentencepiece_vocabularies_are_refused(tmp_path, spm_dir, tiny_llama_dir, case):
    *change, message = DAMAGED[case]
    stated = of_sentencepiece(spm_dir)
    if len(change) == 1:
        stated |= change[0]
    else:
        key, id, value = change
        stated[key][id] = value
    write_gguf(tmp_path / "m.gguf", tiny_llama_dir(vocab=360), **stated)
    with pytest.raises(ValueError, match=message):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_model_is_read_as_sentencepiece_reads_it(spm_dir):
    data = (spm_dir / "tokenizer.model").read_bytes()
    model = read_model(data)
    stated = of_sentencepiece(spm_dir)
    assert [piece.spelling for piece in model.pieces] == stated["tokenizer.ggml.tokens"]
    assert [piece.kind for piece in model.pieces] == stated["tokenizer.ggml.token_type"]
    assert [piece.score for piece in model.pieces] == stated["tokenizer.ggml.scores"]
    assert (model.kind, model.has_rules) == (2, False)
    for damaged in (data[:-3], b"\x0a\xff\xff", b"\x0f" + data):
        with pytest.raises(ValueError, match="not a sentencepiece model"):
            read_model(damaged)


# Quantisations


def table_of_quantisations() -> dict[str, str]:
    """The quantisations that engine/jobs/README.md says are imported exactly."""
    page = (ROOT / "engine" / "jobs" / "README.md").read_text()
    (line,) = re.findall(r"^Imported exactly: (.+?)\.$", page, flags=re.MULTILINE | re.DOTALL)
    return {name: "" for name in re.findall(r"`(\w+)`", line)}


def quantised_kinds() -> list:
    """The formats that the package gguf can dequantise, besides plain floating-point numbers."""
    return [kind for kind in gguf.quants._type_traits if kind.name != "BF16"]


def test_the_page_lists_every_quantisation_that_is_imported():
    plain = {"F32", "F16", "BF16"}
    assert set(table_of_quantisations()) == plain | {kind.name for kind in quantised_kinds()}


def halves_first(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in Hugging Face's order: of each head the even ones, then the odd ones."""
    d = weight.shape[0] // heads
    order = []
    for head in range(heads):
        order += range(head * d, (head + 1) * d, 2)
        order += range(head * d + 1, (head + 1) * d, 2)
    return weight[order]


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_k_quants_are_imported_number_by_number(tmp_path, tiny_llama_dir, kind):
    """A file whose matrices are of such blocks; norms are F32, as in every GGUF."""
    quantised = gguf.GGMLQuantizationType[kind]
    model = tiny_llama_dir(
        vocab=len(vocabulary()), layers=1, hidden=256, intermediate=256, head_dim=64, kv_heads=2
    )
    expected = {}
    blocks = {}
    for n, (name, weight) in enumerate(load_file(model / "model.safetensors").items()):
        expected[name] = weight
        if weight.ndim == 2:
            blocks[gguf_name(name)] = (random_blocks(quantised, *weight.shape, n), quantised)
            expected[name] = gguf.dequantize(blocks[gguf_name(name)][0], quantised)
    write_gguf(tmp_path / "m.gguf", model, blocks=blocks)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in expected.items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads is not None:  # the blocks were drawn in GGUF's order: pairs (i, i + d/2) together
            d = len(weight) // heads
            order = [
                h * d + 2 * (i % (d // 2)) + i // (d // 2) for h in range(heads) for i in range(d)
            ]
            weight = weight[order]
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


@pytest.mark.peers
def test_every_quantisation_is_dequantised_as_llama_cpp_does(run_llama_cpp):
    """Bit for bit, on 16 blocks of random bytes of every format."""
    jobs, ours = {}, {}
    for kind in quantised_kinds():
        numbers, _ = gguf.GGML_QUANT_SIZES[kind]
        blocks = random_blocks(kind, 16, numbers)
        name = re.sub("_k$", "_K", kind.name.lower())
        jobs[name] = (blocks.tobytes().hex(), 16 * numbers)
        ours[name] = gguf.dequantize(blocks, kind).reshape(-1)
    _, theirs = run_llama_cpp("none", {"dequantise": jobs})
    for name, values in ours.items():
        np.testing.assert_array_equal(theirs[name], values, err_msg=name)


# Several parts


@pytest.mark.parametrize("named", [0, 2])
def test_a_model_in_several_parts_equals_the_whole(tmp_path, tiny_llama_dir, named):
    """Whichever part is named."""
    model = tiny_llama_dir(vocab=len(vocabulary()), head_dim=32, kv_heads=2, tied=False)
    write_gguf(tmp_path / "m.gguf", model)
    parts = split_gguf(tmp_path / "m.gguf", 3)
    import_gguf(tmp_path / "m.gguf", tmp_path / "whole")
    assert import_gguf(parts[named], tmp_path / "out")
    assert not import_gguf(parts[0], tmp_path / "out"), "it is recognised"
    for file in (tmp_path / "whole").iterdir():
        if file.name != "gguf_import.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_parts_that_are_missing_or_exchanged_are_named(tmp_path, tiny_llama_dir):
    model = tiny_llama_dir(vocab=len(vocabulary()))
    write_gguf(tmp_path / "m.gguf", model)
    first, second, third = split_gguf(tmp_path / "m.gguf", 3)
    kept = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(ValueError, match="00002-of-00003.gguf says that it is part 3 of 3"):
        import_gguf(first, tmp_path / "out")
    second.unlink()
    with pytest.raises(ValueError, match="m-00002-of-00003.gguf is missing: .* one of 3 parts"):
        import_gguf(third, tmp_path / "out")
    second.write_bytes(kept)
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ValueError, match="says that it is part 1 of 3, its name says part 1 of 1"):
        import_gguf(tmp_path / "renamed.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
