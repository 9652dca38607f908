"""What transformers' tokenizer says about texts: python tokenizer_peer.py DIR TEXTS.json

TEXTS.json is a list of strings. Prints, per text, the ids with special tokens recognised
("template") and as plain text ("plain"), the ids of a text on its own with what the tokenizer adds
("alone"), and the plain ids decoded ("decoded").
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import generate_merges


def load(path: Path) -> Any:
    """The tokenizer of the directory `path`.

    A bare tokenizer.model first gets the tokenizer.json that Llama checkpoints ship with it.
    transformers 5.23 alone would take merges in the order of their ids; the scores, which
    sentencepiece goes by, put runs of spaces last.
    """
    if (path / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(path)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(path, folder, dirs_exist_ok=True)
        document = _tokenizer_json(path / "tokenizer.model")
        Path(folder, "tokenizer.json").write_text(json.dumps(document))
        return AutoTokenizer.from_pretrained(folder)


def _tokenizer_json(file: Path) -> dict:
    """Vocabulary, merges and the bos before a text; LlamaTokenizer makes the other parts itself."""
    model = sentencepiece.SentencePieceProcessor(str(file))
    pieces = [model.id_to_piece(id) for id in range(model.get_piece_size())]
    scores = {piece: model.get_score(id) for id, piece in enumerate(pieces)}
    vocab = {piece: id for id, piece in enumerate(pieces)}
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "decoder")
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "version": "1.0",
        **dict.fromkeys(parts),
        "added_tokens": [],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": generate_merges(vocab, scores),
        },
    }


def answers(path: Path, texts: list[str]) -> dict[str, list]:
    tokenizer = load(path)

    def ids(text: str, **settings: bool) -> list[int]:
        return tokenizer(text, **settings).input_ids

    plain = [ids(text, add_special_tokens=False, split_special_tokens=True) for text in texts]
    return {
        "template": [ids(text, add_special_tokens=False) for text in texts],
        "plain": plain,
        "alone": [ids(text) for text in texts],
        "decoded": tokenizer.batch_decode(plain, skip_special_tokens=True),
    }


if __name__ == "__main__":
    print(json.dumps(answers(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))))
