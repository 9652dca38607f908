"""Tokenizers: the ids of transformers (golden, and live where marked), no forged special token."""

from __future__ import annotations

import json
import shutil
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from model.tokenizer import load_tokenizer
from model.tokenizer_base import Tokenizer
from model.tokenizer_files import role_ids
from tests.helpers.tokenizer_dirs import (
    FLAGS,
    golden,
    golden_checkpoint,
    real_texts,
    spelled,
    tiny_converted,
    tiny_mistral,
    tiny_qwen2,
    tiny_sentencepiece,
    tiny_unigram,
    train_sentencepiece,
    write_json,
)

LINES = list(golden("tokenizer.jsonl"))
TEXTS = [line["text"] for line in LINES]
KINDS = ["smollm2", "llama2", "llama3", "tiny_sentencepiece", "tiny_legacy", "tiny_converted"]
FAMILIES = {"tiny_qwen2": tiny_qwen2, "tiny_mistral": tiny_mistral}  # of their files' shapes
KINDS += FAMILIES


@pytest.fixture(scope="module")
def directory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`directory(kind)` is a tokenizer directory of that kind, made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        path = tmp_path_factory.mktemp(kind)
        if kind == "smollm2":
            return request.getfixturevalue("smollm2_dir")
        if kind == "llama2":
            shared = request.getfixturevalue("shared_data")
            return golden_checkpoint(path, kind, shared / "llama2" / "tokenizer.model")
        if kind == "llama3":
            smollm2 = request.getfixturevalue("smollm2_dir")
            return golden_checkpoint(path, kind, smollm2 / "tokenizer.json")
        if kind == "tiny_converted":
            pytest.importorskip("tokenizers")
            return tiny_converted(path)
        if kind in FAMILIES:
            pytest.importorskip("tokenizers")
            return FAMILIES[kind](path)
        return tiny_sentencepiece(path, legacy=kind == "tiny_legacy")

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make(kind)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def load(directory: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    """`load(kind)` is the tokenizer of `directory(kind)`, loaded once."""
    loaded: dict[str, Tokenizer] = {}

    def get(kind: str) -> Tokenizer:
        if kind not in loaded:
            loaded[kind] = load_tokenizer(directory(kind))
        return loaded[kind]

    return get


# Ids


@pytest.mark.parametrize("kind", ["smollm2", "llama2"])
def test_ids_equal_transformers(load, kind):
    tokenizer = load(kind)
    assert len(LINES) > 200
    for line in LINES:
        text = line["text"]
        assert tokenizer.encode_template(text) == line[kind], text
        assert tokenizer.encode(text) == line.get(f"{kind}_plain", line[kind]), text


@pytest.mark.peers
@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_transformers_live(load, directory, run_peer, tmp_path, request, kind):
    tokenizer = load(kind)
    texts = TEXTS + list(spelled(tokenizer.special, 200))
    shared = Path(__file__).parents[3] / "shared" / "data"
    if shared.is_dir():
        texts += real_texts(shared, 100)
    write_json(tmp_path / "texts.json", texts)
    theirs = run_peer("tokenizer_peer.py", directory(kind), tmp_path / "texts.json")
    for n, text in enumerate(texts):
        assert tokenizer.encode_template(text) == theirs["template"][n], text
        assert tokenizer.encode(text) == theirs["plain"][n], text
        assert tokenizer.decode(theirs["plain"][n]) == theirs["decoded"][n], text
        bos = [tokenizer.bos_id] if tokenizer.add_bos else []
        assert bos + tokenizer.encode_template(text) == theirs["alone"][n], text


@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_never_gives_a_special_token(load, kind):
    tokenizer = load(kind)
    special = set(tokenizer.special.values())
    for text in [*tokenizer.special, *spelled(tokenizer.special, 300)]:
        assert special.isdisjoint(tokenizer.encode(text)), text
        assert special.isdisjoint(tokenizer.encode(text, continues=True)), text
    for spelling, id in tokenizer.special.items():
        assert tokenizer.encode_template(spelling) == [id]


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_continues_gets_no_space(load, kind):
    """Cut before a word or a line break, two encodings are the encoding of the whole."""
    tokenizer = load(kind)
    for head, tail in (("the fox", " jumps"), ("the answer is", "\nthe text"), ("a  b", "\n")):
        joined = tokenizer.encode(head) + tokenizer.encode(tail, continues=True)
        assert joined == tokenizer.encode(head + tail)
    for word in ("the", "Größe", "12"):
        first = tokenizer.encode(word, continues=True)[0]
        assert not tokenizer.piece(first).startswith(" ")
    spelling = list(tokenizer.special)[0]
    ids = tokenizer.encode_template(f"the{spelling} fox", continues=True)
    assert ids == [
        *tokenizer.encode("the", continues=True),
        *tokenizer.encode_template(f"{spelling} fox"),
    ]


def test_settings_decide_on_a_space_before_a_text_and_after_special_tokens(tmp_path, load):
    modern, legacy = load("tiny_sentencepiece"), load("tiny_legacy")
    never = load_tokenizer(tiny_sentencepiece(tmp_path, add_prefix_space=False))

    def pieces(tokenizer: Tokenizer, text: str) -> str:
        return "".join(tokenizer.piece(id) for id in tokenizer.encode_template(text))

    for tokenizer in (modern, legacy):
        assert tokenizer.encode("the") == tokenizer.encode(" the") == never.encode(" the")
        assert tokenizer.decode(tokenizer.encode("the")) == "the"
    assert never.decode(never.encode(" the")) == " the"
    assert pieces(modern, "<s>the</s> the") == "<s>the</s> the"
    assert pieces(legacy, "<s>the</s> the") == "<s> the</s> the"
    assert pieces(never, "the<s>the") == "the<s>the"
    assert modern.encode("") == legacy.encode("") == []


def test_converted_model_has_the_ids_of_its_source(load):
    """A tokenizer.json made as transformers 4 made it, and the tokenizer.model it came from."""
    json_kind, model_kind = load("tiny_converted"), load("tiny_legacy")
    for text in TEXTS:
        if not text.startswith((" ", "\u2581")):  # there the converted one puts another space
            assert json_kind.encode(text) == model_kind.encode(text), text
        assert json_kind.encode(text, continues=True) == model_kind.encode(text, continues=True)


def test_metaspace_has_the_ids_of_its_source(tmp_path, load):
    """The same vocabulary as transformers 5 saves it: a space before the text only."""
    pytest.importorskip("tokenizers")
    path = tiny_converted(tmp_path)
    document = json.loads((path / "tokenizer.json").read_text())
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}
    change = {"normalizer": None, "pre_tokenizer": {**metaspace, "split": False}}
    write_json(path / "tokenizer.json", document | change)
    ours, source = load_tokenizer(path), load("tiny_sentencepiece")
    for text in [*TEXTS, *spelled(source.special, 100)]:
        assert ours.encode(text) == source.encode(text), text
        assert ours.encode(text, continues=True) == source.encode(text, continues=True), text
        assert ours.encode_template(text) == source.encode_template(text), text
        assert ours.decode(ours.encode(text)) == source.decode(source.encode(text))


def test_a_byte_level_vocabulary_puts_its_space_before_a_text_only(tiny_llama_dir):
    pytest.importorskip("tokenizers")
    path = tiny_llama_dir(tokenizer=True)
    document = json.loads((path / "tokenizer.json").read_text())
    document["pre_tokenizer"]["add_prefix_space"] = True
    write_json(path / "tokenizer.json", document)
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("ab") == [*b" ab"]
    assert tokenizer.encode("ab", continues=True) == [*b"ab"]


def test_lone_surrogate_is_a_value_error(load):
    for kind in ("tiny_sentencepiece", "tiny_converted"):
        for encode in (load(kind).encode, load(kind).encode_template):
            with pytest.raises(ValueError, match="surrogates"):
                encode("a\ud800b")


def test_vocabulary_that_forges_a_special_token_is_refused(tiny_llama_dir):
    """A merge that spells </s>, which is then special: plain text must not reach its id."""
    pytest.importorskip("tokenizers")
    path = tiny_llama_dir(tokenizer=True)
    document = json.loads((path / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    added = [token["content"] for token in document["added_tokens"]]
    for spelling in added + ["/s", "</s", "</s>"]:
        vocab[spelling] = len(vocab)
    document["model"]["merges"] = [["/", "s"], ["<", "/s"], ["</s", ">"]]
    document["pre_tokenizer"]["use_regex"] = False  # it would cut between the four characters
    write_json(path / "tokenizer.json", document)
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("</s>") == [261]  # an ordinary token so far
    config = json.loads((path / "tokenizer_config.json").read_text())
    write_json(path / "tokenizer_config.json", config | {"eos_token": "</s>"})
    with pytest.raises(ValueError, match="makes the special token '</s>' out of plain text"):
        load_tokenizer(path).encode("a </s> b")


# Text


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_back_the_encoded_text(load, kind):
    """Exactly, but that sentencepiece has one spelling for a space and for U+2581, and that Qwen2
    composes characters (NFC) before it encodes them."""
    tokenizer = load(kind)
    for text in TEXTS:
        wanted = text
        if kind == "tiny_qwen2":
            wanted = unicodedata.normalize("NFC", text)
        if kind not in ("smollm2", "llama3", "tiny_qwen2"):
            wanted = text.replace("\u2581", " ")
        if kind not in ("smollm2", "llama3", "tiny_qwen2", "tiny_converted"):
            wanted = wanted.removeprefix(" ")  # a text that begins with a space gets no second one
        assert tokenizer.decode(tokenizer.encode(text)) == wanted


def test_qwen2_composes_characters_and_cuts_every_digit(load):
    tokenizer = load("tiny_qwen2")
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")
    assert len(tokenizer.encode("12")) == 2, "1 2 is a merge, but the cut comes before it"
    assert tokenizer.bos_id is None and not tokenizer.add_bos
    assert tokenizer.eos_id == tokenizer.special["<|im_end|>"]


def test_bytes_without_a_token_are_left_out(load):
    tokenizer = load("smollm2")
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"


@pytest.mark.parametrize("kind", ["smollm2", "tiny_sentencepiece", "tiny_converted"])
def test_the_text_of_fewer_ids_is_a_prefix_of_the_whole_text(load, kind):
    """But for a last character that is not complete yet."""
    tokenizer = load(kind)
    for text in ("Größe 漢字 😀👍🏽 done", "a\u0301 शहर", " leading"):
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        for n in range(len(ids)):
            part = tokenizer.decode(ids[:n])
            assert whole.startswith(part.rstrip("\ufffd"))
            assert tokenizer.decode(iter(ids[:n])) == part  # any iterable, same text again


@pytest.mark.parametrize("kind", ["smollm2", "tiny_sentencepiece", "tiny_converted"])
def test_parts_of_characters_special_ids_and_unknown_ids_are_decoded(load, kind):
    """To U+FFFD, to nothing, and to nothing."""
    tokenizer = load(kind)
    ids = tokenizer.encode("😀", continues=True)
    assert len(ids) > 1, "wanted a character of several tokens"
    first = ids[0]
    assert set(tokenizer.decode([first])) == {"\ufffd"}
    assert tokenizer.piece(first).startswith("<0xF0>")
    word = tokenizer.encode("the fox")
    assert tokenizer.decode([*tokenizer.special.values(), *word]) == "the fox"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([tokenizer.vocab_size + 5, *word]) == "the fox"  # padded embedding
    assert [tokenizer.piece(id) for id in tokenizer.special.values()] == list(tokenizer.special)


# Names and ids in the files beside a vocabulary


def test_bos_and_eos_come_from_the_files(tmp_path):
    def roles(path: Path) -> tuple:
        tokenizer = load_tokenizer(path)
        return tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos

    path = train_sentencepiece(tmp_path)
    assert roles(path) == (1, 2, True)  # the model's own, as Llama 2 wants them
    write_json(path / "config.json", {"bos_token_id": 0, "eos_token_id": 1})
    assert roles(path) == (1, 2, True)  # LLaMA-1's conversions kept the ids of another vocabulary
    write_json(path / "special_tokens_map.json", {"bos_token": "", "eos_token": ""})
    assert roles(path) == (1, 2, True)  # an empty name names nothing
    write_json(path / "special_tokens_map.json", {"bos_token": "</s>", "eos_token": "<s>"})
    assert roles(path) == (2, 1, True)
    config = {"bos_token": {"content": "</s>", **FLAGS}, "eos_token": None, "add_bos_token": False}
    write_json(path / "tokenizer_config.json", config)
    assert roles(path) == (2, None, False)


def test_ids_in_config_json_are_used_last_and_only_for_control_tokens(tiny_llama_dir):
    """A tokenizer.json names no roles: config.json does, unless its ids are of another vocabulary,
    or the class or the post-processor names them."""
    pytest.importorskip("tokenizers")

    def roles(tokenizer_config: dict, **config: object) -> tuple:
        path = tiny_llama_dir(tokenizer=True, **config)
        write_json(path / "tokenizer_config.json", tokenizer_config)
        tokenizer = load_tokenizer(path)
        return tokenizer.bos_id, tokenizer.eos_id

    assert roles({}) == (257, 258)
    assert roles({}, bos_token_id=0, eos_token_id=1) == (None, None)  # bytes are no control tokens
    assert roles({}, eos_token_id=[256, 258]) == (257, 256)
    assert roles({"eos_token": None}) == (257, None)
    assert roles({"tokenizer_class": "LlamaTokenizer"}) == (257, 258)  # it has no <s>, </s>


def test_llama_class_and_post_processor_name_bos_and_eos(tmp_path):
    pytest.importorskip("tokenizers")
    path = tiny_converted(tmp_path)
    for kind, eos in (("LlamaTokenizerFast", 2), ("PreTrainedTokenizerFast", 1)):
        write_json(path / "tokenizer_config.json", {"tokenizer_class": kind})
        write_json(path / "config.json", {"bos_token_id": 0, "eos_token_id": 1})
        tokenizer = load_tokenizer(path)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, eos, True)


NO_TOKEN_IDS = [-5, 10**12, "x", {}, True, 1.5, [2, "x"], [-1], [None]]


@pytest.mark.parametrize("value", NO_TOKEN_IDS)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_ids_that_are_not_token_ids_are_refused_by_name(tmp_path, file, value):
    path = train_sentencepiece(tmp_path)
    write_json(path / file, {"eos_token_id": value})
    with pytest.raises(ValueError, match=rf"{file}: eos_token_id is .* a token id, a list of"):
        role_ids(path / file, "eos_token")
    if file == "config.json":
        with pytest.raises(ValueError, match="config.json: eos_token_id is"):
            load_tokenizer(path)


def test_no_end_ids_and_an_empty_list_are_the_same(tmp_path):
    path = train_sentencepiece(tmp_path)
    for value in ([], None):
        write_json(path / "config.json", {"eos_token_id": value, "bos_token_id": value})
        tokenizer = load_tokenizer(path)
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
        assert role_ids(path / "config.json", "eos_token") == []


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": {"x": {"content": "<a>"}}},
        {"added_tokens_decoder": {"360": {"special": True}}},
        {"added_tokens_decoder": ["<a>"]},
        {"added_tokens_decoder": {str(10**15): {"content": "<a>"}}},
        {"eos_token": 5},
        {"eos_token": {"text": "</s>"}},
        {"additional_special_tokens": [5]},
    ],
)
def test_malformed_tokenizer_files_are_a_value_error(tmp_path, settings):
    path = tiny_sentencepiece(tmp_path, **settings)
    with pytest.raises(ValueError, match="tokenizer_config.json.* are not of the form"):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer"):
        load_tokenizer(tmp_path)


def test_an_added_token_is_control_when_it_is_asked_to_be(tmp_path, tiny_llama_dir):
    """However the files mark it: text cannot spell it then, a template can."""
    pytest.importorskip("tokenizers")
    sentencepiece = tiny_sentencepiece(tmp_path)
    write_json(sentencepiece / "added_tokens.json", {"<|im_end|>": 360, "<tool>": 361})
    byte_level = tiny_llama_dir(tokenizer=True)
    document = json.loads((byte_level / "tokenizer.json").read_text())
    for token in document["added_tokens"]:
        token["special"] = False
    write_json(byte_level / "tokenizer.json", document)
    write_json(byte_level / "tokenizer_config.json", {})
    for path, end in ((sentencepiece, 360), (byte_level, 258)):
        plain = load_tokenizer(path)
        control = plain.with_control(["<|im_end|>"])
        assert plain.added["<|im_end|>"] == control.special["<|im_end|>"] == end
        assert "<|im_end|>" not in plain.special and plain.encode("a<|im_end|>")[-1] == end
        assert end not in control.encode("a<|im_end|>b")
        assert control.decode(control.encode("a<|im_end|>b")) == "a<|im_end|>b"
        assert control.encode_template("a<|im_end|>b")[1:-1].count(end) == 1
        assert control.decode([end]) == "" and control.piece(end) == "<|im_end|>"
        assert control.with_control([]).special == control.special


def test_unigram_text_that_spells_control_pieces_is_encoded_as_sentencepiece_does(tmp_path):
    """A converted Unigram model has its control pieces in the vocabulary that text is matched
    with; sentencepiece keeps them out."""
    pytest.importorskip("tokenizers")
    path = tiny_unigram(tmp_path / "json")
    source = load_tokenizer(train_sentencepiece(tmp_path, model_type="unigram", vocab_size=330))
    ours = load_tokenizer(path)
    assert source.special == ours.special == {"<unk>": 0, "<s>": 1, "</s>": 2}
    texts = ["a<s>b", "<s>", "</s> the", "the<unk>", "a <s><s> b</s>", "<s", *TEXTS]
    texts += spelled(source.special, 200)
    for text in texts:
        if "<0x" in text:  # a converted file matches the text <0x0A> as the byte, as we do
            continue
        assert ours.encode(text, continues=True) == source.encode(text, continues=True), text
        assert ours.encode(text) == source.encode(text), text
    pieces = [ours.piece(id) for id in ours.encode("a<s>b", continues=True)]
    assert "".join(pieces) == "a<s>b" and "<s>" not in pieces
    assert ours.encode_template("a<s>b")[-2] == 1


def test_tokenizer_json_adds_bos_by_its_post_processor(load):
    converted, smollm2 = load("tiny_converted"), load("smollm2")
    assert (converted.bos_id, converted.add_bos) == (1, True)
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.add_bos) == (1, 2, False)
    assert smollm2.named["unk_token"] == "<|endoftext|>"


def test_added_tokens_of_a_sentencepiece_checkpoint_are_matched_in_text(tmp_path):
    path = tiny_sentencepiece(tmp_path, additional_special_tokens=["<|im_end|>"])
    write_json(path / "added_tokens.json", {"<|im_end|>": 360, "<tool>": 361, "<tool>s": 362})
    listed = load_tokenizer(path)
    added = {
        "0": {"content": "<unk>", **FLAGS, "special": True},
        "360": {"content": "<|im_end|>", **FLAGS, "special": True},
        "361": {"content": "<tool>", **FLAGS, "special": False},
        "362": {"content": "<tool>s", **FLAGS, "special": False},
    }
    (path / "added_tokens.json").unlink()
    config = json.loads((path / "tokenizer_config.json").read_text())
    write_json(path / "tokenizer_config.json", config | {"added_tokens_decoder": added})
    for tokenizer in (listed, load_tokenizer(path)):
        assert tokenizer.vocab_size == 363
        assert tokenizer.special["<|im_end|>"] == 360 and "<tool>" not in tokenizer.special
        the = tokenizer.encode("the")
        assert tokenizer.encode_template("the<|im_end|><tool>s") == [*the, 360, 362]
        plain = tokenizer.encode("the<tool><|im_end|>")
        assert plain[: len(the) + 1] == [*the, 361] and 360 not in plain
        assert tokenizer.decode(plain) == "the<tool><|im_end|>"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"5": {"content": "<pad>", **FLAGS}}, "spells id 5 '<0x02>', the files beside it say"),
        ({"360": {"content": "<mask>", **FLAGS, "lstrip": True}}, "'<mask>' sets lstrip"),
    ],
)
def test_unsupported_flags_of_added_tokens_are_refused(tmp_path, entry, reason):
    path = tiny_sentencepiece(tmp_path, added_tokens_decoder=entry)
    with pytest.raises(ValueError, match=reason):
        load_tokenizer(path)


def test_tokens_declared_beside_a_tokenizer_json_are_added_to_it(load):
    """The llama3 directory declares six tokens that its tokenizer.json leaves out."""
    tokenizer = load("llama3")
    assert tokenizer.vocab_size == 49158
    assert tokenizer.special["<|eot_id|>"] == tokenizer.eos_id == 49156
    assert tokenizer.encode_template("a<|eot_id|><tool>b")[1:3] == [49156, 49157]
    assert tokenizer.encode("<tool>") == [49157] and tokenizer.decode([49157]) == "<tool>"


def test_tokens_declared_with_another_id_are_refused(tiny_llama_dir):
    pytest.importorskip("tokenizers")
    path = tiny_llama_dir(tokenizer=True)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"300": {"content": "<|im_end|>", **FLAGS, "special": True}}
    write_json(path / "tokenizer_config.json", config)
    with pytest.raises(ValueError, match=r"gives '<\|im_end\|>' the id 258, .* say 300"):
        load_tokenizer(path)


# Files that cannot be loaded


def test_a_missing_tokenizer_is_an_error_that_names_both_files(tmp_path):
    with pytest.raises(ValueError, match="looked for tokenizer.json and tokenizer.model"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_without_the_package_names_the_extra(tmp_path, monkeypatch):
    """A tokenizer.model beside it is not taken instead."""
    tiny_sentencepiece(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[bpe\]'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\n", b"\x00\xff" * 40])
def test_a_tokenizer_model_that_is_no_sentencepiece_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        load_tokenizer(tmp_path)


def test_model_that_merges_spaces_is_refused(tmp_path):
    train_sentencepiece(tmp_path, remove_extra_whitespaces=True)
    with pytest.raises(ValueError, match="drops or merges spaces"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, r"\['WordPiece'\]"),
        ({"decoder": None}, "decodes by nothing"),
        ({"model": {"type": "Nonesuch"}}, "cannot be read by tokenizers"),
    ],
)
def test_a_tokenizer_json_with_another_model_or_decoder_is_refused(tiny_llama_dir, change, reason):
    pytest.importorskip("tokenizers")
    path = tiny_llama_dir(tokenizer=True)
    document = json.loads((path / "tokenizer.json").read_text())
    write_json(path / "tokenizer.json", document | change)
    with pytest.raises(ValueError, match=reason):
        load_tokenizer(path)


@pytest.mark.parametrize(("content", "reason"), [("{", "is not JSON"), ("[]", "holds a list")])
def test_broken_settings_name_their_file(tmp_path, content, reason):
    path = tiny_sentencepiece(tmp_path)
    (path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=f"tokenizer_config.json {reason}"):
        load_tokenizer(path)


def test_baked_in_truncation_and_padding_are_switched_off(tmp_path, load, directory):
    shutil.copytree(directory("tiny_converted"), tmp_path, dirs_exist_ok=True)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    document["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    write_json(tmp_path / "tokenizer.json", document)
    for text in ("the", "the quick brown fox jumps over the lazy dog"):
        assert load_tokenizer(tmp_path).encode(text) == load("tiny_converted").encode(text)
