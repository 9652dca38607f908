"""Text to token ids and back, for the two kinds of tokenizer file that Llama checkpoints ship.

`tokenizer.json` (package `tokenizers`, extra `bpe`) is read where it exists, else `tokenizer.model`
(`sentencepiece`). Ids equal those of transformers 5 with `add_special_tokens=False`:

  special tokens    are recognised in what a chat template wrote (`encode_template`) and never in
                    plain text (`encode`): there `</s>` is four characters like any others.
  tokenizer.json    is followed as it stands. (transformers 5 rebuilds some classes, LlamaTokenizer
                    among them, from vocabulary and merges alone and then departs from the file.)
  tokenizer.model   A space is put before a text that does not begin with one, as in Llama 2's
                    training. `"legacy": true` in tokenizer_config.json puts one after every special
                    token too, so that `<s>[INST]` reads `<s> [INST]`: Meta's encoding of Llama 2
                    chats, and what transformers 4 took a missing `legacy` to mean. Missing or
                    false, as in Llama-2-chat-hf, only the start of the text gets one.
                    `"add_prefix_space": false` puts none. sentencepiece alone would add a second
                    space to a text that begins with one; transformers 5 does not. Pieces are merged
                    by score, as in training. (transformers 5.23 goes by id when it finds no
                    tokenizer.json beside the model, and then cuts runs of spaces otherwise.)
  added tokens      beyond the vocabulary (added_tokens.json, `added_tokens_decoder`) are matched as
                    transformers matches them: those that are not special in plain text as well. But
                    for those that a chat template writes around turns: `with_control` makes a
                    tokenizer to which they are special, however the files mark them.
  bos and eos       are what the small files name; else the tokenizer's own (the control pieces of a
                    tokenizer.model, the bos that a tokenizer.json's post-processor puts, <s> and
                    </s> of class LlamaTokenizer); else those that config.json gives by id, if they
                    are control tokens: it often kept the ids of another vocabulary.

Decoding goes by bytes: every id stands for fixed bytes (none for a special token) and a text is
their concatenation read as UTF-8. So a longer list of ids only adds to what a shorter one gave, or
completes its last character. transformers' "clean up" of spaces before punctuation is not done: it
cannot be undone.
"""

from __future__ import annotations

import copy
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import read_json
from model.files import check_file, check_links

ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
SPACE = "\u2581"  # how sentencepiece spells a space inside a piece
BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
LARGEST_ID = 1 << 28  # no vocabulary is that large


def load_tokenizer(path: str | Path, control: Collection[str] = ()) -> Tokenizer:
    """The tokenizer of the checkpoint directory `path`; `control` as in `Tokenizer.with_control`.

    ValueError when the directory holds none, or one that is not supported; ImportError when there
    is a tokenizer.json and the package `tokenizers` is missing. (A tokenizer.model beside it is not
    taken instead: its ids may differ, and would then depend on what is installed.)
    """
    path = Path(path)
    check_links(path)
    kinds = {"tokenizer.json": JsonTokenizer, "tokenizer.model": SentencePieceTokenizer}
    for name, kind in kinds.items():
        if (path / name).exists():
            check_file(path / name)
            return kind(path, frozenset(control))
    raise ValueError(
        f"{path} holds no tokenizer: looked for tokenizer.json and tokenizer.model; "
        "copy it from the checkpoint the weights came from"
    )


class Tokenizer(ABC):
    """What the engine knows of a tokenizer.

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
        self._source = source  # the directory, and what was made special beside what it says
        self.special = dict(sorted(special.items(), key=lambda item: item[1]))
        self.bos_id = special.get(named.get("bos_token", ""))
        self.eos_id = special.get(named.get("eos_token", ""))
        self.vocab_size = max(*bytes_of, *special.values()) + 1
        self.add_bos = False
        self.special_pattern = any_of(special)
        self._spelling = {id: spelling for spelling, id in special.items()}
        self._bytes_of = bytes_of
        self._strips_space = strips_space
        self._never_plain = set(special.values()) - {unk_id}

    def with_control(self, spellings: Iterable[str]) -> Tokenizer:
        """This tokenizer with the added tokens `spellings` special, however the files mark them.

        They are then recognised where a chat template writes them alone, and text that spells them
        is encoded as its characters.
        """
        path, control = self._source
        return load_tokenizer(path, control | {*spellings})

    @abstractmethod
    def _encode_plain(self, text: str, continues: bool) -> list[int]: ...

    @abstractmethod
    def _encode_template(self, text: str) -> list[int]: ...

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Ids of plain text; a spelled special token is ordinary text. No bos, no eos.

        `continues`: the text goes on after other text, so no space is put before it (byte-level
        vocabularies never put one). A byte that a byte-level vocabulary has no token for is left
        out, as transformers leaves it out; SmolLM2's lacks six control characters and bytes of
        unassigned planes. ValueError for text that is not valid Unicode.
        """
        text.encode()  # a lone surrogate: UnicodeEncodeError (a ValueError) for both kinds
        ids = self._encode_plain(text, continues)
        if not self._never_plain.isdisjoint(ids):
            spelling = next(self._spelling[id] for id in ids if id in self._never_plain)
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
        head = text[: match.start()] if match else text
        return self.encode(head, continues=True) + self._encode_template(text[len(head) :])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: special tokens skipped, bytes that are not UTF-8 as U+FFFD.

        The space that encoding puts before a text is taken off again.
        """
        joined = b"".join(self._bytes_of.get(id, b"") for id in ids)
        if self._strips_space:
            joined = joined.removeprefix(b" ")
        return joined.decode("utf-8", errors="replace")

    def piece(self, id: int) -> str:
        """One token for display: its text, or <0xNN> a byte where it is part of a character."""
        if id in self._spelling:
            return self._spelling[id]
        piece = self._bytes_of.get(id, b"")
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in piece)


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`: byte-level BPE (Llama 3, SmolLM2) or a converted sentencepiece model."""

    def __init__(self, path: Path, control: frozenset[str] = frozenset()) -> None:
        file = path / "tokenizer.json"
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise ImportError(
                f"{file} needs the package tokenizers -> pip install -e '.[bpe]'"
            ) from None
        except ImportError as error:  # it is there; memory may be short, or it is broken
            raise ImportError(f"{file}: tokenizers cannot be imported: {error}") from None
        notes = _Notes.read(path, control)
        document = read_json(file)

        def build(text: str, plain: bool, hidden: Collection[str] = ()) -> Any:
            try:
                built = tokenizers.Tokenizer.from_str(text)
            except Exception as error:  # the package raises bare Exception
                raise ValueError(f"{file} cannot be read by tokenizers: {error}") from error
            built.no_truncation()
            built.no_padding()
            notes.add_to(built, file, hidden)
            built.encode_special_tokens = plain
            return built

        # `encode_special_tokens` is a switch on the object; an object for each setting keeps
        # encoding a pure function.
        text = file.read_text(encoding="utf-8")
        self._template = build(text, plain=False)
        added = self._template.get_added_tokens_decoder()
        hidden = {token.content for token in added.values() if token.special}
        hidden = _hide_pieces(document, hidden)
        text = json.dumps(document) if hidden else text
        self._plain = self._continuing = build(text, plain=True, hidden=hidden)
        steps = copy.deepcopy({key: document.get(key) for key in ("normalizer", "pre_tokenizer")})
        if _drop_prefix(list(steps.values())):
            self._continuing = build(json.dumps(document | steps), plain=True, hidden=hidden)

        decoder, unk = document.get("decoder"), document["model"].get("unk_token")
        bytes_of = _bytes_of_vocab(self._template.get_vocab(False), decoder, file)
        bytes_of |= {id: b"" if t.special else t.content.encode() for id, t in added.items()}
        special = {token.content: id for id, token in added.items() if token.special}
        super().__init__(
            named=notes.roles(special, self._own_roles(notes, special)),
            special=special,
            bytes_of=bytes_of,
            unk_id=document["model"].get("unk_id", self._template.token_to_id(unk or "")),
            strips_space=_strips_space(decoder),
            added={token.content: id for id, token in added.items()},
            source=(path, control),
        )
        # A tokenizer.json that adds bos does so in its post-processor, also to an empty text.
        self.add_bos = self.bos_id is not None and self.bos_id in self._template.encode("").ids

    def _own_roles(self, notes: _Notes, special: dict[str, int]) -> dict[str, str]:
        """bos and eos as the tokenizer itself has them: by its class, by its post-processor."""
        own = {}
        if str(notes.settings.get("tokenizer_class")).startswith("LlamaTokenizer"):
            own = {"bos_token": "<s>", "eos_token": "</s>"}
        spelling_of = {id: spelling for spelling, id in special.items()}
        first = spelling_of.get(next(iter(self._template.encode("").ids), -1))
        own |= {"bos_token": first} if first else {}
        return {role: spelling for role, spelling in own.items() if spelling in special}

    def _encode_plain(self, text: str, continues: bool) -> list[int]:
        encoder = self._continuing if continues else self._plain
        return encoder.encode(text, add_special_tokens=False).ids

    def _encode_template(self, text: str) -> list[int]:
        return self._template.encode(text, add_special_tokens=False).ids


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
        notes = _Notes.read(path, control)
        added = notes.added_to_pieces(pieces, file)
        ids = {piece: id for id, piece in pieces.items()} | added

        own_roles = {"bos": own.bos_id(), "eos": own.eos_id(), "unk": own.unk_id()}
        named = {f"{role}_token": pieces[id] for role, id in own_roles.items() if id >= 0}
        special = {
            pieces[id]: id
            for id in range(size)
            if self._model.is_control(id) or self._model.is_unknown(id)
        }
        special |= {s: ids[s] for s in notes.special if s in ids}
        named = notes.roles(special, named)
        special |= {s: ids[s] for s in named.values() if s in ids}
        bytes_of = {id: _bytes_of_piece(piece) for piece, id in ids.items()}
        bytes_of |= {id: spelling.encode() for spelling, id in added.items()}
        bytes_of |= dict.fromkeys(special.values(), b"")

        prefix = notes.settings.get("add_prefix_space")
        self._prefix = own.normalize("a") != "a" if prefix is None else bool(prefix)
        self._prefix_after_special = self._prefix and bool(notes.settings.get("legacy", False))
        self._added_pattern = any_of(set(added) - set(special))
        self._template_pattern = any_of({*added, *special})
        self._added = added | special
        super().__init__(
            named, special, bytes_of, own.unk_id(), self._prefix, added, (path, control)
        )
        self.add_bos = self.bos_id is not None and bool(notes.settings.get("add_bos_token", True))

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
        prefix = self._prefix_after_special if start else self._prefix and not continues
        if text and prefix and text[0] not in (" ", SPACE):
            text = " " + text
        return self._model.encode(text)


# What the small files beside a vocabulary say


@dataclass(frozen=True)
class _Notes:
    """tokenizer_config.json, special_tokens_map.json, added_tokens.json and config.json, merged."""

    settings: dict[str, Any]  # tokenizer_config.json
    named: dict[str, str | None]  # role -> spelling; None: the checkpoint says it has none
    ids: dict[str, int | None]  # bos and eos in config.json, where nothing else knows them
    added: dict[int, dict[str, Any]]  # id -> spelling ("content") and flags
    special: frozenset[str]  # spellings that are special if they have an id

    @classmethod
    def read(cls, path: Path, control: Collection[str] = ()) -> _Notes:
        """What the files of `path` say; `control` are further spellings that are special."""
        settings = read_json(path / "tokenizer_config.json", {})
        spellings = read_json(path / "special_tokens_map.json", {}) | settings
        listed = read_json(path / "added_tokens.json", {})
        try:
            return cls._merged(path, settings, spellings, listed, control)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"the tokenizer files of {path} (tokenizer_config.json, special_tokens_map.json, "
                f"added_tokens.json) are not of the form that tokenizers have: {error!r}; copy "
                "them from the original checkpoint"
            ) from None

    @classmethod
    def _merged(
        cls,
        path: Path,
        settings: dict[str, Any],
        spellings: dict[str, Any],
        listed: dict[str, int],
        control: Collection[str],
    ) -> _Notes:
        # An empty name, as LLaMA-1 conversions have them, names nothing.
        named = {role: _spelling(spellings[role]) for role in ROLES if role in spellings}
        named = {role: spelling for role, spelling in named.items() if spelling != ""}
        ids = {role: next(iter(role_ids(path / "config.json", role)), None) for role in ROLES[:2]}
        extra = spellings.get("additional_special_tokens") or []
        extra = extra or spellings.get("extra_special_tokens") or []
        extra = extra.values() if isinstance(extra, dict) else extra
        special = {_spelling(token) for token in extra} | {s for s in named.values() if s}
        special |= {*control}

        declared = settings.get("added_tokens_decoder")
        if declared is not None:
            added = {_added_id(id): token for id, token in declared.items()}
        else:
            added = {
                _added_id(id): {"content": s, "special": s in special} for s, id in listed.items()
            }
        special |= {token["content"] for token in added.values() if token.get("special")}
        return cls(settings, named, ids, added, frozenset(special))

    def roles(self, special: dict[str, int], own: dict[str, str]) -> dict[str, str]:
        """Role -> spelling: what the files name, else the tokenizer's own, else what config.json
        knows by id, if that is one of the control tokens `special`."""
        spelling_of = {id: spelling for spelling, id in special.items()}
        found: dict[str, str | None] = {
            role: spelling_of[id] for role, id in self.ids.items() if id in spelling_of
        }
        found |= own | self.named
        return {role: spelling for role, spelling in found.items() if spelling}

    def add_to(self, tokenizer: Any, file: Path, hidden: Collection[str] = ()) -> None:
        """Declare to a `tokenizers.Tokenizer` the added and special tokens its file leaves out,
        but for the `hidden` ones, which it is not to know."""
        from tokenizers import AddedToken

        known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        for id, entry in sorted(self.added.items()):
            spelling = entry["content"]
            if spelling in hidden:
                continue
            if spelling not in known:
                flags = {k: v for k, v in entry.items() if k not in ("content", "__type")}
                known[spelling] = AddedToken(spelling, **flags)
                tokenizer.add_tokens([known[spelling]])
            found = tokenizer.token_to_id(spelling)
            if found != id:
                raise ValueError(
                    f"{file} gives {spelling!r} the id {found}, the files beside it say {id}; "
                    "take all tokenizer files from one checkpoint"
                )
        # A special token without an id has no row in the model either, so it is left out.
        for spelling in sorted(self.special - {*hidden}):
            token = known.get(spelling) or AddedToken(spelling, normalized=False)
            if tokenizer.token_to_id(spelling) is not None and not token.special:
                token.special = True
                tokenizer.add_special_tokens([token])

    def added_to_pieces(self, pieces: dict[int, str], file: Path) -> dict[str, int]:
        """Spelling -> id of the tokens added to a sentencepiece model with these `pieces`."""
        for id, token in self.added.items():
            if id in pieces and pieces[id] != token["content"]:
                raise ValueError(
                    f"{file} spells id {id} {pieces[id]!r}, the files beside it say "
                    f"{token['content']!r}; take all tokenizer files from one checkpoint"
                )
            strips = [f for f in ("lstrip", "rstrip", "single_word") if token.get(f)]
            if strips:
                raise ValueError(
                    f"{file}: the added token {token['content']!r} sets {strips[0]}, which is not "
                    "supported with a tokenizer.model; save the tokenizer as tokenizer.json"
                )
        return {token["content"]: id for id, token in self.added.items() if id not in pieces}


def _spelling(token: Any) -> str | None:
    """A token is written as its spelling or as an object with flags."""
    spelling = token["content"] if isinstance(token, dict) else token
    if spelling is not None and not isinstance(spelling, str):
        raise TypeError(f"a token is {token!r}, wanted its text")
    return spelling


def _added_id(id: Any) -> int:
    """The id of an added token, which JSON keys spell as text."""
    if not str(id).isdecimal() or int(id) > LARGEST_ID:
        raise TypeError(f"an added token has the id {id!r}")
    return int(id)


def role_ids(file: Path, role: str) -> list[int]:
    """The ids that config.json or generation_config.json gives a role (`eos_token`): none, one or
    several. ValueError naming the file where its value is no token id, list of them or null."""
    value = read_json(file, {}).get(f"{role}_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for id in ids:
        if type(id) is not int or not 0 <= id <= LARGEST_ID:  # to isinstance true is an int
            raise ValueError(
                f"{file}: {role}_id is {value!r}; a token id, a list of token ids or null is wanted"
            )
    return ids


def any_of(spellings: Iterable[str]) -> re.Pattern:
    """Matches any of `spellings`, the longest first; never matches when there are none."""
    longest_first = sorted(filter(None, spellings), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


# What a token stands for


def _parts(decoder: dict | None) -> Sequence[dict]:
    """The steps of a tokenizer.json's decoder."""
    return decoder.get("decoders", [decoder]) if decoder else []


def _bytes_of_vocab(vocab: dict[str, int], decoder: dict | None, file: Path) -> dict[int, bytes]:
    kinds = [part["type"] for part in _parts(decoder)]
    if "ByteLevel" in kinds:
        byte_of = _byte_of_character()
        return {
            id: bytes(byte_of[c] for c in token) if byte_of.keys() >= set(token) else token.encode()
            for token, id in vocab.items()
        }
    if kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return {id: _bytes_of_piece(piece) for piece, id in vocab.items()}
    raise ValueError(
        f"{file} decodes by {kinds or 'nothing'}; byte-level and sentencepiece-like vocabularies "
        "(the two that Llama checkpoints use) are supported"
    )


def _bytes_of_piece(piece: str) -> bytes:
    """The bytes of a sentencepiece piece: <0xNN> is a byte, U+2581 a space."""
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte.group(1)) if byte else piece.replace(SPACE, " ").encode()


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE spells a byte as its Latin-1 character, the n-th that has none as 256 + n."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


def _hide_pieces(document: dict[str, Any], special: Collection[str]) -> set[str]:
    """Make a Unigram tokenizer.json one whose vocabulary text cannot match at `special` pieces.

    sentencepiece keeps its control pieces out of the vocabulary that text is matched with; a
    converted file has them in it, under their spelling. Returns those that were hidden.
    """
    if document["model"].get("type") != "Unigram":
        return set()
    vocab = document["model"]["vocab"]
    hidden = {piece for piece, _ in vocab} & {*special}
    # U+10FFFF is no character: text does not have it, and ids stay where they are.
    document["model"]["vocab"] = [
        [f"\U0010ffff{piece}" if piece in hidden else piece, score] for piece, score in vocab
    ]
    document["added_tokens"] = [
        token for token in document.get("added_tokens") or [] if token["content"] not in hidden
    ]
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
        return any([_drop_prefix(step) for step in node])  # a list: every step is to be changed
    if not isinstance(node, dict):
        return False
    match node.get("type"):
        case "Sequence":
            return _drop_prefix([*node.values()])
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
