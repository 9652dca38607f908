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

from model.tokenizer_base import SPACE, Tokenizer, any_of, bytes_of_piece
from model.tokenizer_files import TokenizerFiles


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `tokenizer.model` (Llama 2, TinyLlama) with the tokens added to it."""

    def __init__(self, path: Path, control: frozenset[str] = frozenset()) -> None:
        import sentencepiece

        file = path / "tokenizer.model"
        self._model = sentencepiece.SentencePieceProcessor()
        # A serialized message with another appended is the two merged: this adds
        # normalizer_spec { add_dummy_prefix: false }. Where a space goes is decided below.
        try:
            own = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
            self._model.LoadFromSerializedProto(file.read_bytes() + b"\x1a\x02\x18\x00")
        except RuntimeError as error:
            raise ValueError(
                f"{file} is not a sentencepiece model ({error}); the tokenizer.model in Llama 3's "
                "`original` folder is another format: take the Hugging Face tokenizer.json"
            ) from None
        if self._model.normalize(" a  b ") != " a  b ".replace(" ", SPACE):
            raise ValueError(
                f"{file} drops or merges spaces, so text cannot be restored; only models made "
                "without remove_extra_whitespaces (Llama's) are supported"
            )
        size = self._model.get_piece_size()
        pieces = {id: self._model.id_to_piece(id) for id in range(size)}
        files = TokenizerFiles.read(path, control)
        added = files.added_to_pieces(pieces, file)
        ids = {piece: id for id, piece in pieces.items()} | added

        own_roles = {"bos": own.bos_id(), "eos": own.eos_id(), "unk": own.unk_id()}
        named = {f"{role}_token": pieces[id] for role, id in own_roles.items() if id >= 0}
        special = {
            pieces[id]: id
            for id in range(size)
            if self._model.is_control(id) or self._model.is_unknown(id)
        }
        special |= {s: ids[s] for s in files.special if s in ids}
        named = files.roles(special, named)
        special |= {s: ids[s] for s in named.values() if s in ids}
        bytes_of = {id: bytes_of_piece(piece) for piece, id in ids.items()}
        bytes_of |= {id: spelling.encode() for spelling, id in added.items()}
        bytes_of |= dict.fromkeys(special.values(), b"")

        prefix = files.settings.get("add_prefix_space")
        self._prefix = own.normalize("a") != "a" if prefix is None else bool(prefix)
        self._prefix_after_special = self._prefix and bool(files.settings.get("legacy", False))
        self._added_pattern = any_of(set(added) - set(special))
        self._template_pattern = any_of({*added, *special})
        self._added = added | special
        super().__init__(
            named, special, bytes_of, own.unk_id(), self._prefix, added, (path, control)
        )
        self.add_bos = self.bos_id is not None and bool(files.settings.get("add_bos_token", True))

    def _encode_plain(self, text: str, continues: bool) -> list[int]:
        return self._encode_around(self._added_pattern, text, continues)

    def _encode_template(self, text: str) -> list[int]:
        return self._encode_around(self._template_pattern, text, False)

    def _encode_around(self, pattern: re.Pattern, text: str, continues: bool) -> list[int]:
        """Ids of `text`, the tokens that `pattern` matches looked up and the rest encoded."""
        ids: list[int] = []
        start = 0
        for match in pattern.finditer(text):
            ids += self._encode_fragment(text[start : match.start()], start, continues)
            ids.append(self._added[match.group()])
            start = match.end()
        return ids + self._encode_fragment(text[start:], start, continues)

    def _encode_fragment(self, text: str, start: int, continues: bool) -> list[int]:
        """Ids of plain text that stands at `start` of the whole, with the space that it gets."""
        prefix = self._prefix_after_special if start else self._prefix and not continues
        if text and prefix and text[0] not in (" ", SPACE):
            text = " " + text
        return self._model.encode(text)
