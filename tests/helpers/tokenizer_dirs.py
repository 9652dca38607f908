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


# merges of tiny_qwen2, in rank order: a digit merge never applies, for digits are cut one by one
QWEN2_MERGES = "Ġ t,h e,Ġt he,1 2,i n,o x,Ġ f,Ġf ox,Ċ Ċ,Ã ©,Ġ Ġ,a n,e r".split(",")
QWEN2_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) "
    "or message.role == 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def tiny_qwen2(path: Path) -> Path:
    """A tokenizer.json of Qwen2's shape: NFC, its cut with every digit alone, special tokens after
    the vocabulary, no bos; a chat template that puts a system message of its own first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spellings = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    spellings += [merge.replace(" ", "") for merge in QWEN2_MERGES]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = []
    for n, spelling in enumerate(special):
        added.append({"id": len(spellings) + n, "content": spelling, "special": True, **FLAGS})
    pieces = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    cut = {"type": "Split", "pattern": {"Regex": pieces}, "behavior": "Isolated", "invert": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {spelling: id for id, spelling in enumerate(spellings)},
            "merges": QWEN2_MERGES,
        },
    }
    write_json(path / "tokenizer.json", document)
    declared = {str(token["id"]): {**token, "id": None} for token in added}
    for token in declared.values():
        del token["id"]
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": declared,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
        "split_special_tokens": False,
        "chat_template": QWEN2_TEMPLATE,
    }
    write_json(path / "tokenizer_config.json", settings)
    return path


MISTRAL_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] %}"
    "{%- set turns = messages[1:] %}"
    "{%- else %}"
    "{%- set turns = messages %}"
    "{%- endif %}"
    "{{- bos_token }}"
    "{%- for message in turns %}"
    "{%- if message['role'] == 'user' %}"
    "{%- if loop.first and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}"
    "{%- endif %}"
    "{%- else %}"
    "{{- ' ' + message['content'] | trim + eos_token }}"
    "{%- endif %}"
    "{%- endfor %}"
)


def tiny_mistral(path: Path) -> Path:
    """A tokenizer.json of Mistral v0.3's shape: a converted sentencepiece model with a space before
    the text only, and [INST], [/INST] as control tokens beside <s> and </s>."""
    tiny_converted(path)
    document = json.loads((path / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    for spelling in ("[INST]", "[/INST]"):
        token = {"id": len(vocab), "content": spelling, "special": True, **FLAGS}
        vocab[spelling] = len(vocab)
        document["added_tokens"].append(token)
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}
    document |= {"normalizer": None, "pre_tokenizer": {**metaspace, "split": False}}
    write_json(path / "tokenizer.json", document)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    write_json(path / "tokenizer_config.json", settings | {"chat_template": MISTRAL_TEMPLATE})
    return path


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
