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
        # LLaMA-1 conversions have empty names: they name nothing.
        named = {role: _spelling(spellings[role]) for role in ROLES if role in spellings}
        named = {role: spelling for role, spelling in named.items() if spelling != ""}
        ids = {role: next(iter(role_ids(path / "config.json", role)), None) for role in ROLES[:2]}
        extra = spellings.get("additional_special_tokens")
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
        """Role -> spelling: the name in these files, else the tokenizer's own, else that of the id
        in config.json, if it is one of the control tokens `special`."""
        spelling_of = {id: spelling for spelling, id in special.items()}
        roles: dict[str, str | None] = {
            role: spelling_of[id] for role, id in self.ids.items() if id in spelling_of
        }
        roles |= own | self.named
        return {role: spelling for role, spelling in roles.items() if spelling}

    def add_to(self, tokenizer: Any, file: Path, hidden: Collection[str] = ()) -> None:
        """Declare to a `tokenizers.Tokenizer` the added and special tokens that its file leaves
        out, except the `hidden` ones. ValueError where ids disagree."""
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
            own_id = tokenizer.token_to_id(spelling)
            if own_id != id:
                raise ValueError(
                    f"{file} gives {spelling!r} the id {own_id}, the files beside it say {id}; "
                    "take all tokenizer files from one checkpoint"
                )
        # A special token without an id has no row in the model either, so it is left out.
        for spelling in sorted(self.special - {*hidden}):
            token = known.get(spelling) or AddedToken(spelling, normalized=False)
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
            strips = [f for f in ("lstrip", "rstrip", "single_word") if token.get(f)]
            if strips:
                raise ValueError(
                    f"{file}: the added token {token['content']!r} sets {strips[0]}, which is not "
                    "supported with a tokenizer.model; save the tokenizer as tokenizer.json"
                )
        return {token["content"]: id for id, token in self.added.items() if id not in pieces}


def role_ids(file: Path, role: str) -> list[int]:
    """The ids that config.json or generation_config.json gives a role (`eos_token`): none, one or
    several. ValueError naming the file where its value is no token id, list of them or null."""
    value = read_json(file, {}).get(f"{role}_id")
    ids = value if isinstance(value, list) else [value]
    if value is None:
        ids = []
    for id in ids:
        if type(id) is not int or not 0 <= id <= LARGEST_ID:  # not isinstance: true would be an int
            raise ValueError(
                f"{file}: {role}_id is {value!r}; expected a token id, a list of token ids or null"
            )
    return ids


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
