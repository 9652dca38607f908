"""Tokenizer directories for tests, and texts: golden, composed of special tokens, real."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
SENTENCES = """\
the quick brown fox jumps over the lazy dog and the dog sleeps on
a tokenizer cuts a text into pieces and gives every piece a number
the answer to the question is the number of pieces in the text
write a response to the instruction that completes the request
    return the sum of the numbers    and   the product
12 and 34 make 46; 7 times 6 is 42
[INST] <<SYS>> be brief <</SYS>> name a colour [/INST] blue
""".splitlines()


def golden(name: str) -> Iterator[dict]:
    """The lines of tests/golden/`name`."""
    with (GOLDEN / name).open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON."""
    path.write_text(json.dumps(value), encoding="utf-8")


def golden_checkpoint(path: Path, name: str, vocabulary: Path) -> Path:
    """tests/golden/chat_`name` in `path`, with the vocabulary file it was made for."""
    shutil.copytree(GOLDEN / f"chat_{name}", path, dirs_exist_ok=True)
    shutil.copy(vocabulary, path)
    return path


def train_sentencepiece(path: Path, **settings: object) -> Path:
    """Train `path`/tokenizer.model: byte-fallback BPE with Llama's settings, 360 pieces."""
    defaults = {
        "vocab_size": 360,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_prefix=str(path / "tokenizer"),
        **(defaults | settings),
    )
    (path / "tokenizer.vocab").unlink()
    return path


def tiny_sentencepiece(path: Path, **config: object) -> Path:
    """A directory with a trained tokenizer.model and a tokenizer_config.json like Llama 2's."""
    train_sentencepiece(path)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(
        path / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", **named, "add_bos_token": True, **config},
    )
    return path


def tiny_converted(path: Path) -> Path:
    """The trained model as transformers 4 converts one: a tokenizer.json that prepends a space.

    Of TinyLlama's shape: a space goes before a text and after every special token.
    """
    train_sentencepiece(path)
    file = path / "tokenizer.model"
    model = sentencepiece.SentencePieceProcessor(str(file))
    file.unlink()
    pieces = [model.id_to_piece(id) for id in range(model.get_piece_size())]
    scores = {piece: model.get_score(id) for id, piece in enumerate(pieces)}
    merges = _merges(scores)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    unspace = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    decoders = [
        unspace,
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": pieces[id], "special": True, **FLAGS} for id in range(3)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: id for id, piece in enumerate(pieces)},
            "merges": merges,
        },
    }
    write_json(path / "tokenizer.json", document)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(
        path / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **named},
    )
    return path


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary, as transformers derives them: every cut of a piece into two
    pieces, that of the highest score first, of equal scores that with the longer first part."""
    merges = []
    for piece in scores:
        for n in range(1, len(piece)):
            first, second = piece[:n], piece[n:]
            if first in scores and second in scores:
                merges.append((first, second))

    def rank(pair: tuple[str, str]) -> tuple[float, int]:
        first, second = pair
        return scores[first + second], len(first)

    merges.sort(key=rank, reverse=True)
    return merges


def tiny_unigram(path: Path) -> Path:
    """A trained Unigram model as transformers converts one: a tokenizer.json alone."""
    path.mkdir()
    file = train_sentencepiece(path, model_type="unigram", vocab_size=330) / "tokenizer.model"
    model = sentencepiece.SentencePieceProcessor(str(file))
    file.unlink()
    size = range(model.get_piece_size())
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}
    document = {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": model.id_to_piece(id), "special": True, **FLAGS}
            for id in range(3)
        ],
        "normalizer": None,
        "pre_tokenizer": {**metaspace, "split": False},
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "byte_fallback": True,
            "vocab": [[model.id_to_piece(id), model.get_score(id)] for id in size],
        },
    }
    write_json(path / "tokenizer.json", document)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(path / "tokenizer_config.json", named)
    return path


def spelled(special: dict[str, int], count: int, seed: int = 0) -> Iterator[str]:
    """Texts put together from special spellings, halves of them, and other short texts."""
    draw = random.Random(seed)
    whole = list(special)
    halves = []
    for text in whole:
        middle = len(text) // 2
        halves += [text[:middle], text[middle:]]
    around = ["", " ", "\n", "a", "word ", "\u2581", "<", ">", "|", "\U000f0000", "é"]
    for _ in range(count):
        kinds = draw.choices([whole, halves, around], [4, 2, 3], k=draw.randint(1, 7))
        yield "".join(draw.choice(kind) for kind in kinds)


def real_texts(shared_data: Path, per_file: int) -> list[str]:
    """Texts from the paper's data: instructions, answers, code, function calls."""
    names = ("alpaca_train", "dolly_train", "gsm8k_train", "openfunction_train")
    found = []
    for name in names:
        rows = json.loads((shared_data / f"{name}.json").read_text(encoding="utf-8"))
        texts = []
        for row in rows:
            texts += [value for value in row.values() if isinstance(value, str) and value]
        found += random.Random(0).sample(texts, per_file)
    return found
