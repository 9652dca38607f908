"""A `tokenizer.json` (package `tokenizers`, extra `bpe`).

The file is followed as it stands. (transformers 5 rebuilds some classes, LlamaTokenizer among them,
from vocabulary and merges alone and then departs from the file.)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from model.config import read_json
from model.messages import THOUGHT_TAGS
from model.tokenizer_base import SPACE, Tokenizer, bytes_of_piece
from model.tokenizer_files import TokenizerFiles


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`: byte-level BPE (Llama 3, SmolLM2) or a converted sentencepiece model."""

    def __init__(self, path: Path, control: frozenset[str] = frozenset()) -> None:
        """Read the file and those beside it.

        control: spellings that are special whatever the files say. ValueError for a file that is
        not supported; ImportError without the package `tokenizers`.
        """
        file = path / "tokenizer.json"
        package = _import_tokenizers(file)
        files = TokenizerFiles.read(path, control)
        document = read_json(file)

        # `encode_special_tokens` is a switch on the object; an object for each setting keeps
        # encoding a pure function.
        text = file.read_text(encoding="utf-8")
        if _make_thought_tags_text(document):
            text = json.dumps(document)
        self._template = _build(package, text, files, file, plain=False)
        added: dict[int, Any] = self._template.get_added_tokens_decoder()  # id -> AddedToken
        special = {token.content: id for id, token in added.items() if token.special}
        hidden = _hide_pieces(document, special)
        if hidden:
            text = json.dumps(document)
        self._plain = _build(package, text, files, file, plain=True, hidden=hidden)
        self._continuing = self._plain
        steps = {
            "normalizer": copy.deepcopy(document.get("normalizer")),
            "pre_tokenizer": copy.deepcopy(document.get("pre_tokenizer")),
        }
        if _drop_prefix(list(steps.values())):
            text = json.dumps(document | steps)
            self._continuing = _build(package, text, files, file, plain=True, hidden=hidden)

        decoder = document.get("decoder")
        bytes_of = _bytes_of_vocab(self._template.get_vocab(False), decoder, file)
        for id, token in added.items():
            bytes_of[id] = b"" if token.special else token.content.encode()
        unk_token = document["model"].get("unk_token") or ""
        unk_id = document["model"].get("unk_id", self._template.token_to_id(unk_token))
        super().__init__(
            named=files.roles(special, self._own_roles(files, special)),
            special=special,
            bytes_of=bytes_of,
            unk_id=unk_id,
            strips_space=_strips_space(decoder),
            added={token.content: id for id, token in added.items()},
            source=(path, control),
        )
        # A tokenizer.json that adds bos does so in its post-processor, also to an empty text.
        self.add_bos = self.bos_id is not None and self.bos_id in self._template.encode("").ids

    def _own_roles(self, files: TokenizerFiles, special: dict[str, int]) -> dict[str, str]:
        """bos and eos as the tokenizer itself has them: by its class, by its post-processor."""
        own = {}
        if str(files.settings.get("tokenizer_class")).startswith("LlamaTokenizer"):
            own = {"bos_token": "<s>", "eos_token": "</s>"}
        ids_of_empty_text = self._template.encode("").ids  # only what the post-processor puts
        spelling_of = {id: spelling for spelling, id in special.items()}
        if ids_of_empty_text:
            first = spelling_of.get(ids_of_empty_text[0])
            if first:
                own["bos_token"] = first
        return {role: spelling for role, spelling in own.items() if spelling in special}

    def _encode_plain(self, text: str, continues: bool) -> list[int]:
        encoder = self._continuing if continues else self._plain
        return encoder.encode(text, add_special_tokens=False).ids

    def _encode_template(self, text: str) -> list[int]:
        return self._template.encode(text, add_special_tokens=False).ids


def _import_tokenizers(file: Path) -> ModuleType:
    """The package `tokenizers`; ImportError, naming the file that needs it, where it is missing."""
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ImportError(
            f"{file} needs the package tokenizers -> pip install -e '.[bpe]'"
        ) from None
    except ImportError as error:  # it is there; memory may be short, or it is broken
        raise ImportError(f"{file}: tokenizers cannot be imported: {error}") from None
    return tokenizers


def _build(
    package: ModuleType,
    text: str,
    files: TokenizerFiles,
    file: Path,
    *,
    plain: bool,
    hidden: Collection[str] = (),
) -> Any:
    """A `tokenizers.Tokenizer` of the text of a tokenizer.json, with the tokens of `files`.

    plain: encode spelled special tokens as ordinary text. hidden: spellings that are not added.
    ValueError where the package cannot read the text.
    """
    try:
        built = package.Tokenizer.from_str(text)
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{file} cannot be read by tokenizers: {error}") from error
    built.no_truncation()
    built.no_padding()
    files.add_to(built, file, hidden)
    built.encode_special_tokens = plain
    return built


def _parts(decoder: dict | None) -> Sequence[dict]:
    """The steps of a tokenizer.json's decoder, which may be one or a sequence."""
    if not decoder:
        return []
    return decoder.get("decoders", [decoder])


def _bytes_of_vocab(vocab: dict[str, int], decoder: dict | None, file: Path) -> dict[int, bytes]:
    """id -> bytes of every token of the vocabulary; ValueError for another kind of vocabulary."""
    kinds = [part["type"] for part in _parts(decoder)]
    if "ByteLevel" in kinds:
        byte_of = _byte_of_character()
        bytes_of = {}
        for token, id in vocab.items():
            spells_bytes = byte_of.keys() >= set(token)
            bytes_of[id] = bytes(byte_of[c] for c in token) if spells_bytes else token.encode()
        return bytes_of
    if kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return {id: bytes_of_piece(piece) for piece, id in vocab.items()}
    raise ValueError(
        f"{file} decodes by {kinds or 'nothing'}; byte-level and sentencepiece-like vocabularies "
        "(the two that Llama checkpoints use) are supported"
    )


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE spells a byte as its Latin-1 character, the n-th that has none as 256 + n
    (GPT-2's bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    for n, byte in enumerate(others):
        byte_of[chr(256 + n)] = byte
    return byte_of


def _make_thought_tags_text(document: dict[str, Any]) -> bool:
    """Make the tags of thoughts tokens of text in a tokenizer.json; returns whether any was not."""
    changed = False
    for token in document.get("added_tokens") or []:
        is_tag = isinstance(token, dict) and token.get("content") in THOUGHT_TAGS
        if is_tag and token.get("special"):
            token["special"] = False
            changed = True
    return changed


def _hide_pieces(document: dict[str, Any], special: Collection[str]) -> set[str]:
    """Make a Unigram tokenizer.json one whose vocabulary text cannot match at `special` pieces.

    sentencepiece keeps its control pieces out of the vocabulary that text is matched with; a
    converted file has them in it, under their spelling. Returns those that were hidden.
    """
    if document["model"].get("type") != "Unigram":
        return set()
    vocab = document["model"]["vocab"]  # list of [piece, score]; the id is the place in the list
    hidden = {piece for piece, _ in vocab} & set(special)
    changed_vocab = []
    for piece, score in vocab:
        # U+10FFFF is no character: text does not have it, and ids stay where they are.
        spelling = f"\U0010ffff{piece}" if piece in hidden else piece
        changed_vocab.append([spelling, score])
    document["model"]["vocab"] = changed_vocab
    added_tokens = document.get("added_tokens") or []
    document["added_tokens"] = [token for token in added_tokens if token["content"] not in hidden]
    return hidden


def _strips_space(decoder: dict | None) -> bool:
    """Whether decoding takes off the space that encoding put before the text."""
    for part in _parts(decoder):
        if part["type"] == "Strip" and part.get("content") == " " and part.get("start"):
            return True
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return True
    return False


def _drop_prefix(node: Any) -> bool:
    """Make steps of a tokenizer.json put no space before a text; returns whether any did."""
    if isinstance(node, list):
        changed = [_drop_prefix(step) for step in node]  # every step, before any() looks
        return any(changed)
    if not isinstance(node, dict):
        return False
    match node.get("type"):
        case "Sequence":
            return _drop_prefix(list(node.values()))
        case "Prepend" if node["prepend"] in (" ", SPACE):
            node["prepend"] = ""
        case "Metaspace" if node.get("prepend_scheme", "always") != "never":
            node["prepend_scheme"] = "never"
            node.pop("add_prefix_space", None)  # its older spelling
        case "ByteLevel" if node.get("add_prefix_space"):
            node["add_prefix_space"] = False
        case _:
            return False
    return True
