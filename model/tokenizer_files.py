"""The small files beside a vocabulary: which tokens they add, name and mark as special.

tokenizer_config.json      settings, added_tokens_decoder, names of bos, eos, ...
special_tokens_map.json    names of bos, eos, ... (older)
added_tokens.json          spelling -> id of added tokens (older)
config.json                ids of bos and eos, used where nothing else names them
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import read_json
from model.messages import THOUGHT_TAGS

ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
LARGEST_ID = 1 << 28  # no vocabulary is that large


@dataclass(frozen=True)
class TokenizerFiles:
    """The statements of tokenizer_config.json, special_tokens_map.json, added_tokens.json and
    config.json, merged."""

    settings: dict[str, Any]  # tokenizer_config.json
    named: dict[str, str | None]  # role -> spelling; None: the checkpoint states it has none
    ids: dict[str, int | None]  # of bos and eos in config.json, where no other file names them
    added: dict[int, dict[str, Any]]  # id -> spelling ("content") and flags
    special: frozenset[str]  # spellings that are special if they have an id

    @classmethod
    def read(cls, path: Path, control: Collection[str] = ()) -> TokenizerFiles:
        """Read the files of `path`; `control` are further spellings that are special.

        ValueError where they do not have the form of tokenizer files.
        """
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
    ) -> TokenizerFiles:
        """The files' contents as one object; `spellings` are those of tokenizer_config.json and of
        special_tokens_map.json, `listed` is added_tokens.json."""
        # 1. bos, eos, ...: by name, and by id in config.json
        named: dict[str, str | None] = {}
        for role in ROLES:
            if role in spellings:
                spelling = _spelling(spellings[role])
                if spelling != "":  # LLaMA-1 conversions have empty names: they name nothing
                    named[role] = spelling
        ids: dict[str, int | None] = {}
        for role in ("bos_token", "eos_token"):
            ids_of_role = role_ids(path / "config.json", role)
            ids[role] = ids_of_role[0] if ids_of_role else None

        # 2. the special tokens
        special = set(control)
        special |= {spelling for spelling in named.values() if spelling}
        special |= {_spelling(token) for token in _extra_special_tokens(spellings)}
        special -= set(THOUGHT_TAGS)

        # 3. the added tokens, some of which are special too
        added: dict[int, dict[str, Any]] = {}
        declared = settings.get("added_tokens_decoder")
        if declared is not None:
            for id, token in declared.items():
                added[_added_id(id)] = _as_text(token)
        else:
            for spelling, id in listed.items():
                added[_added_id(id)] = {"content": spelling, "special": spelling in special}
        special |= {token["content"] for token in added.values() if token.get("special")}
        return cls(settings, named, ids, added, frozenset(special))

    def roles(self, special: dict[str, int], own: dict[str, str]) -> dict[str, str]:
        """Role -> spelling: the name in these files, else the tokenizer's own, else that of the id
        in config.json, if it is one of the control tokens `special`."""
        spelling_of = {id: spelling for spelling, id in special.items()}
        roles: dict[str, str | None] = {}
        for role, id in self.ids.items():
            if id in spelling_of:
                roles[role] = spelling_of[id]
        roles |= own
        roles |= self.named  # None where a file states that there is no such token
        return {role: spelling for role, spelling in roles.items() if spelling}

    def add_to(self, tokenizer: Any, file: Path, hidden: Collection[str] = ()) -> None:
        """Declare to a `tokenizers.Tokenizer` the added and special tokens that its file leaves
        out, except the `hidden` ones. ValueError where ids disagree."""
        from tokenizers import AddedToken

        own_added = tokenizer.get_added_tokens_decoder()  # id -> AddedToken
        known = {token.content: token for token in own_added.values()}
        for id, entry in sorted(self.added.items()):
            spelling = entry["content"]
            if spelling in hidden:
                continue
            if spelling not in known:
                no_flags = ("content", "__type")
                flags = {name: value for name, value in entry.items() if name not in no_flags}
                known[spelling] = AddedToken(spelling, **flags)
                tokenizer.add_tokens([known[spelling]])
            own_id = tokenizer.token_to_id(spelling)
            if own_id != id:
                raise ValueError(
                    f"{file} gives {spelling!r} the id {own_id}, the files beside it say {id}; "
                    "take all tokenizer files from one checkpoint"
                )
        # A special token without an id has no row in the model either, so it is left out.
        for spelling in sorted(self.special - set(hidden)):
            token = known.get(spelling)
            if token is None:
                token = AddedToken(spelling, normalized=False)
            if tokenizer.token_to_id(spelling) is not None and not token.special:
                token.special = True
                tokenizer.add_special_tokens([token])

    def added_to_pieces(self, pieces: dict[int, str], file: Path) -> dict[str, int]:
        """Spelling -> id of the tokens added to a sentencepiece model with these `pieces`.

        ValueError where a piece has another spelling here, or an added token an unsupported flag.
        """
        for id, token in self.added.items():
            if id in pieces and pieces[id] != token["content"]:
                raise ValueError(
                    f"{file} spells id {id} {pieces[id]!r}, the files beside it say "
                    f"{token['content']!r}; take all tokenizer files from one checkpoint"
                )
            for flag in ("lstrip", "rstrip", "single_word"):
                if token.get(flag):
                    raise ValueError(
                        f"{file}: the added token {token['content']!r} sets {flag}, which is not "
                        "supported with a tokenizer.model; save the tokenizer as tokenizer.json"
                    )
        return {token["content"]: id for id, token in self.added.items() if id not in pieces}


def _as_text(token: dict[str, Any]) -> dict[str, Any]:
    """An entry of an added token, not special where it is a tag of thoughts.

    Decoding leaves special tokens out, and a thought would then look like the answer behind it.
    """
    if token["content"] in THOUGHT_TAGS:
        return {**token, "special": False}
    return token


def role_ids(file: Path, role: str) -> list[int]:
    """The ids that config.json or generation_config.json gives a role (`eos_token`): none, one or
    several. ValueError naming the file where its value is no token id, list of them or null."""
    value = read_json(file, {}).get(f"{role}_id")
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    for id in ids:
        is_int = type(id) is int  # not isinstance, for which true is an int
        if not is_int or not 0 <= id <= LARGEST_ID:
            raise ValueError(
                f"{file}: {role}_id is {value!r}; expected a token id, a list of token ids or null"
            )
    return ids


def _extra_special_tokens(spellings: dict[str, Any]) -> Collection[Any]:
    """The special tokens that have no role: texts, or objects with flags."""
    extra = spellings.get("additional_special_tokens")
    if not extra:
        extra = spellings.get("extra_special_tokens")
    if not extra:
        return []
    if isinstance(extra, dict):  # name -> token
        return extra.values()
    return extra


def _spelling(token: Any) -> str | None:
    """The spelling of a token, which files write as text or as an object with flags."""
    spelling = token["content"] if isinstance(token, dict) else token
    if spelling is not None and not isinstance(spelling, str):
        raise TypeError(f"a token is {token!r}, expected its text")
    return spelling


def _added_id(id: Any) -> int:
    """The id of an added token, which JSON keys spell as text."""
    if not str(id).isdecimal() or int(id) > LARGEST_ID:
        raise TypeError(f"an added token has the id {id!r}")
    return int(id)
