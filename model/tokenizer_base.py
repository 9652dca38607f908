"""The interface of a tokenizer: text to ids and back, whatever file it came from.

Special tokens are recognised in text that a chat template wrote (`encode_template`) and never in
plain text (`encode`): there `</s>` is four characters like any others.

Decoding goes by bytes: every id stands for fixed bytes (none for a special token) and a text is
their concatenation read as UTF-8. So a longer list of ids only adds to the text of a shorter one,
or completes its last character. transformers' "clean up" of spaces before punctuation is not done:
it cannot be undone.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

SPACE = "\u2581"  # how sentencepiece spells a space inside a piece
BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


class Tokenizer(ABC):
    """A tokenizer. Subclasses are made from a checkpoint directory and a set of spellings that are
    special whatever its files say: `Kind(path, control)`.

    vocab_size      one more than the largest id
    bos_id, eos_id  begin and end of a text, None where the checkpoint has none
    add_bos         whether the checkpoint wants bos before every text (Llama 2 and 3 do); a
                    tokenizer.model does unless tokenizer_config.json says otherwise
    special         spelling -> id of every special (control) token
    added           spelling -> id of every token that is matched in text before the vocabulary,
                    special or not
    named           bos_token, eos_token, unk_token, ... -> spelling, as chat templates see them
    """

    def __init__(
        self,
        named: dict[str, str],
        special: dict[str, int],
        bytes_of: dict[int, bytes],
        unk_id: int | None,
        strips_space: bool,
        added: dict[str, int],
        source: tuple[Path, frozenset[str]],
    ) -> None:
        self.named = named
        self.added = added | special
        self._source = source  # (directory, spellings made special beside those that it names)
        self.special = dict(sorted(special.items(), key=lambda item: item[1]))
        self.bos_id = special.get(named.get("bos_token", ""))
        self.eos_id = special.get(named.get("eos_token", ""))
        largest_id = max(*bytes_of, *special.values())
        self.vocab_size = largest_id + 1
        self.add_bos = False
        self.special_pattern = any_of(special)
        self._spelling = {id: spelling for spelling, id in special.items()}
        self._bytes_of = bytes_of
        self._strips_space = strips_space
        self._never_plain = set(special.values()) - {unk_id}

    def with_control(self, spellings: Iterable[str]) -> Tokenizer:
        """This tokenizer with the added tokens `spellings` special, however the files mark them;
        tags of thoughts (model/messages.py) never are.

        They are then recognised only where a chat template writes them; plain text that spells
        them is encoded as its characters.
        """
        path, control = self._source
        return type(self)(path, control | {*spellings})

    @abstractmethod
    def _encode_plain(self, text: str, continues: bool) -> list[int]:
        """Ids of plain text, in which special tokens are not recognised."""

    @abstractmethod
    def _encode_template(self, text: str) -> list[int]:
        """Ids of text in which special tokens are recognised."""

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Ids of plain text; a spelled special token is ordinary text. No bos, no eos.

        `continues`: the text follows other text, so no space is put before it (byte-level
        vocabularies never put one). A byte that a byte-level vocabulary has no token for is left
        out, as transformers leaves it out; SmolLM2's lacks six control characters and bytes of
        unassigned planes. ValueError for text that is not valid Unicode.
        """
        text.encode()  # UnicodeEncodeError (a ValueError) for a lone surrogate
        ids = self._encode_plain(text, continues)
        if not self._never_plain.isdisjoint(ids):
            forged = [id for id in ids if id in self._never_plain]
            spelling = self._spelling[forged[0]]
            raise ValueError(
                f"this tokenizer makes the special token {spelling!r} out of plain text, so a user "
                "could forge it; its vocabulary cannot be used safely"
            )
        return ids

    def encode_template(self, text: str, *, continues: bool = False) -> list[int]:
        """Ids of text that a chat template wrote: spelled special tokens become their ids."""
        text.encode()
        if not continues:
            return self._encode_template(text)
        match = self.special_pattern.search(text)
        if match is None:
            plain, rest = text, ""
        else:
            plain, rest = text[: match.start()], text[match.start() :]
        return self.encode(plain, continues=True) + self._encode_template(rest)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: special tokens skipped, bytes that are not UTF-8 as U+FFFD.

        The space that encoding puts before a text is taken off again.
        """
        data = b"".join(self._bytes_of.get(id, b"") for id in ids)
        if self._strips_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def piece(self, id: int) -> str:
        """One token for display: its text, or <0xNN> a byte where it is part of a character."""
        if id in self._spelling:
            return self._spelling[id]
        piece = self._bytes_of.get(id, b"")
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in piece)


def any_of(spellings: Iterable[str]) -> re.Pattern:
    """Matches any of `spellings`, the longest first; never matches when there are none.

    An empty spelling is left out: it would match everywhere.
    """
    not_empty = [spelling for spelling in spellings if spelling]
    longest_first = sorted(not_empty, key=len, reverse=True)
    if not longest_first:
        return re.compile("(?!)")
    return re.compile("|".join(re.escape(spelling) for spelling in longest_first))


def bytes_of_piece(piece: str) -> bytes:
    """The bytes of a sentencepiece piece: <0xNN> is a byte, U+2581 a space."""
    byte = BYTE_PIECE.fullmatch(piece)
    if byte:
        return bytes.fromhex(byte.group(1))
    return piece.replace(SPACE, " ").encode()
