"""A sentencepiece `tokenizer.model` (Llama 2, TinyLlama) with the tokens added to it.

A space is put before a text that does not begin with one, as in Llama 2's training. Settings of
tokenizer_config.json:

    "legacy": true               puts one after every special token too, so that `<s>[INST]` reads
                                 `<s> [INST]`: Meta's encoding of Llama 2 chats, and transformers
                                 4's reading of a missing `legacy`. Missing or false, as in
                                 Llama-2-chat-hf, only the start of the text gets one.
    "add_prefix_space": false    puts none.

sentencepiece alone would add a second space to a text that begins with one; transformers 5 does
not. Pieces are merged by score, as in training. (transformers 5.23 goes by id when it finds no
tokenizer.json beside the model, and then cuts runs of spaces otherwise.)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from model.tokenizer_base import SPACE, Tokenizer, any_of, bytes_of_piece
from model.tokenizer_files import TokenizerFiles


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `tokenizer.model` (Llama 2, TinyLlama) with the tokens added to it."""

    def __init__(self, path: Path, control: frozenset[str] = frozenset()) -> None:
        """Read the file and those beside it.

        control: spellings that are special whatever the files say. ValueError for a file that is
        not supported.
        """
        file = path / "tokenizer.model"
        as_it_is, self._model = _load(file)
        files = TokenizerFiles.read(path, control)
        settings = files.settings

        # 1. the pieces of the model, and the tokens added to it
        pieces: dict[int, str] = {}
        special: dict[str, int] = {}
        for id in range(self._model.get_piece_size()):
            pieces[id] = self._model.id_to_piece(id)
            if self._model.is_control(id) or self._model.is_unknown(id):
                special[pieces[id]] = id
        added = files.added_to_pieces(pieces, file)
        ids = {piece: id for id, piece in pieces.items()} | added

        # 2. which of them are special, and which are bos, eos, ...
        own_ids = {
            "bos_token": as_it_is.bos_id(),
            "eos_token": as_it_is.eos_id(),
            "unk_token": as_it_is.unk_id(),
        }
        own_roles = {role: pieces[id] for role, id in own_ids.items() if id >= 0}
        special |= {spelling: ids[spelling] for spelling in files.special if spelling in ids}
        named = files.roles(special, own_roles)
        special |= {spelling: ids[spelling] for spelling in named.values() if spelling in ids}

        # 3. the bytes that each stands for
        bytes_of = {id: bytes_of_piece(piece) for piece, id in ids.items()}
        bytes_of |= {id: spelling.encode() for spelling, id in added.items()}
        bytes_of |= dict.fromkeys(special.values(), b"")

        # 4. where a space is put before a text
        self._prefix = as_it_is.normalize("a") != "a"
        if settings.get("add_prefix_space") is not None:
            self._prefix = bool(settings["add_prefix_space"])
        self._prefix_after_special = self._prefix and bool(settings.get("legacy", False))

        self._added_pattern = any_of(set(added) - set(special))
        self._template_pattern = any_of(set(added) | set(special))
        self._added = added | special
        super().__init__(
            named=named,
            special=special,
            bytes_of=bytes_of,
            unk_id=as_it_is.unk_id(),
            strips_space=self._prefix,
            added=added,
            source=(path, control),
        )
        self.add_bos = self.bos_id is not None and bool(settings.get("add_bos_token", True))

    def _encode_plain(self, text: str, continues: bool) -> list[int]:
        return self._encode_around(self._added_pattern, text, continues)

    def _encode_template(self, text: str) -> list[int]:
        return self._encode_around(self._template_pattern, text, False)

    def _encode_around(self, pattern: re.Pattern, text: str, continues: bool) -> list[int]:
        """Ids of `text`, the tokens that `pattern` matches looked up and the rest encoded."""
        ids: list[int] = []
        start = 0  # of the text after the last match
        for match in pattern.finditer(text):
            between = text[start : match.start()]
            ids += self._encode_fragment(between, start, continues)
            ids.append(self._added[match.group()])
            start = match.end()
        ids += self._encode_fragment(text[start:], start, continues)
        return ids

    def _encode_fragment(self, text: str, start: int, continues: bool) -> list[int]:
        """Ids of plain text that stands at `start` of the whole, with the space that it gets."""
        follows_special = start > 0
        if follows_special:
            prefix = self._prefix_after_special
        else:
            prefix = self._prefix and not continues
        if text and prefix and text[0] not in (" ", SPACE):
            text = " " + text
        return self._model.encode(text)


def _load(file: Path) -> tuple[Any, Any]:
    """(the sentencepiece model as its file has it, the same without a space before a text).

    ValueError where the file is no sentencepiece model, or one that cannot restore spaces.
    """
    import sentencepiece

    serialized = file.read_bytes()
    without_prefix = sentencepiece.SentencePieceProcessor()
    try:
        as_it_is = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        # A serialized message with another appended is the two merged: this adds
        # normalizer_spec { add_dummy_prefix: false }. `_encode_fragment` puts the space.
        without_prefix.LoadFromSerializedProto(serialized + b"\x1a\x02\x18\x00")
    except RuntimeError as error:
        raise ValueError(
            f"{file} is not a sentencepiece model ({error}); the tokenizer.model in Llama 3's "
            "`original` folder is another format: take the Hugging Face tokenizer.json"
        ) from None
    if without_prefix.normalize(" a  b ") != " a  b ".replace(" ", SPACE):
        raise ValueError(
            f"{file} drops or merges spaces, so text cannot be restored; only models made "
            "without remove_extra_whitespaces (Llama's) are supported"
        )
    return as_it_is, without_prefix
