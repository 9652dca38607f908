"""900 generated instructions; a program checks whether an answer follows them

Thirty kinds of constraint (KINDS), each about thirty subjects (instruction_words.txt): enough items
to see a paired difference of a few points, with answers short enough to take minutes. The forty
instructions of instructions.py are too few for that. The idea is IFEval's (Zhou et al. 2023,
2311.07911); prompts and checks are ours, so that scores compare arms with each other and with
nothing else. Only the form of an answer is judged, not whether it is true.

Nothing is drawn: kind and number of an item (0 to 29) give its subject, its numbers and its
wording. An answer is cut at MAX_NEW_TOKENS and judged as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from engine.evaluate.tasks.base import Item, Task, Verdict
from engine.evaluate.tasks.constraints import (
    Check,
    begins,
    bullet_count,
    ends,
    excludes,
    includes,
    json_list,
    json_object,
    language,
    line_count,
    lowercase,
    matches,
    mentions,
    numbered,
    one_of,
    sentence_count,
    uppercase,
    without_character,
    word_count,
)
from engine.runtime.files import sha256

TABLE = Path(__file__).with_name("instruction_words.txt")
PER_KIND = 30
MAX_NEW_TOKENS = 64
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
RARE_LETTERS = "qzxjkv"
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


class Instruction(NamedTuple):
    """A prompt, and the constraints that its answer has to meet."""

    prompt: str
    checks: tuple[Check, ...]


@cache
def words() -> dict[str, list[str]]:
    """The lists of instruction_words.txt by name."""
    lists = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, entries = line.partition(": ")
            lists[name] = entries.split(" | ")
    return lists


def _word(name: str, i: int) -> str:
    """An entry of a list; shorter lists begin again."""
    entries = words()[name]
    return entries[i % len(entries)]


# ---- amounts of text


def _few_words(i: int) -> Instruction:
    n = (10, 15, 20, 30, 40)[i % 5]
    return Instruction(f"Describe {_word('subject', i)} in at most {n} words.", (word_count(2, n),))


def _exact_words(i: int) -> Instruction:
    n = (3, 4, 5, 6)[i % 4]
    prompt = f"Describe {_word('subject', i)} in exactly {n} words."
    return Instruction(prompt, (word_count(n, n),))


def _one_word(i: int) -> Instruction:
    prompt = f"{_word('one_word', i)} Answer with one word."
    return Instruction(prompt, (word_count(1, 1),))


def _one_sentence(i: int) -> Instruction:
    ask = ("Say in one sentence what {} is like.", "Write exactly one sentence about {}.")[i % 2]
    return Instruction(ask.format(_word("subject", i)), (sentence_count(1, 1), word_count(3)))


def _sentences(i: int) -> Instruction:
    n = 2 + i % 2
    prompt = f"Write exactly {NUMBER_WORDS[n]} short sentences about {_word('subject', i)}."
    return Instruction(prompt, (sentence_count(n, n),))


# ---- lists


def _bullets(i: int) -> Instruction:
    n = 3 + i % 3
    prompt = (
        f'Name {NUMBER_WORDS[n]} {_word("category", i)}, each on a line that begins with "- ". '
        "Write nothing else."
    )
    return Instruction(prompt, (bullet_count(n), line_count(n)))


def _numbered(i: int) -> Instruction:
    n = 3 + i % 3
    prompt = f"Name {NUMBER_WORDS[n]} {_word('category', i)} as a list numbered 1. to {n}."
    return Instruction(prompt, (numbered(n),))


def _lines(i: int) -> Instruction:
    n = 3 + i % 3
    prompt = f"Name {NUMBER_WORDS[n]} {_word('category', i)}, one per line, with nothing else."
    return Instruction(prompt, (line_count(n), word_count(n, 4 * n), without_character(":")))


def _separated(i: int) -> Instruction:
    n = 3 + i % 3
    sign, name = ((";", "semicolons"), ("/", "slashes"), ("|", "vertical bars"))[i % 3]
    prompt = (
        f"Name {NUMBER_WORDS[n]} {_word('category', i)} on one line, separated by {name} ({sign}), "
        "with nothing else."
    )
    entry = rf"[^{sign}\n]*\w[^{sign}\n]*"
    pattern = rf"{entry}(?:\{sign}{entry}){{{n - 1}}}"
    return Instruction(prompt, (matches(pattern, f"{n} entries separated by {name}"),))


def _capital_lines(i: int) -> Instruction:
    prompt = (
        f"Name three {_word('category', i)}, one per line, in capital letters only. Write nothing "
        "else."
    )
    return Instruction(prompt, (line_count(3), uppercase()))


# ---- letters and words


def _lowercase(i: int) -> Instruction:
    prompt = f"Write one sentence about {_word('subject', i)} in lower case letters only."
    return Instruction(prompt, (lowercase(), word_count(3)))


def _uppercase(i: int) -> Instruction:
    sign = _word("sign", i)
    prompt = f"Write this sign in capital letters only, and nothing else: {sign}"
    return Instruction(prompt, (uppercase(), one_of(sign)))


def _keywords(i: int) -> Instruction:
    first, second = _word("pair", i).split(", ")
    prompt = f"Write one sentence that contains the words {first} and {second}."
    return Instruction(prompt, (includes(first, second), sentence_count(1, 1)))


def _without_word(i: int) -> Instruction:
    thing = _word("thing", i)
    prompt = f'Describe a {thing} in one sentence without using the word "{thing}".'
    if thing[0] in "aeiou":
        prompt = prompt.replace("a " + thing, "an " + thing)
    return Instruction(prompt, (excludes(thing, thing + "s"), word_count(4)))


def _without_letter(i: int) -> Instruction:
    subject = _word("subject", i)
    first = i % len(RARE_LETTERS)
    rotated = RARE_LETTERS[first:] + RARE_LETTERS[:first]
    letter = next(letter for letter in rotated if letter not in subject)
    prompt = f'Write one sentence about {subject} that does not contain the letter "{letter}".'
    return Instruction(prompt, (without_character(letter), word_count(4)))


def _no_commas(i: int) -> Instruction:
    prompt = f"Name three {_word('category', i)} in one sentence. Do not use any comma."
    return Instruction(prompt, (without_character(","), word_count(4), sentence_count(1, 1)))


def _repeated_word(i: int) -> Instruction:
    word, _ = _word("pair", i).split(", ")
    prompt = f'Write one or two sentences that use the word "{word}" exactly twice.'
    return Instruction(prompt, (mentions(word, 2, 2),))


# ---- beginnings and ends


def _begins(i: int) -> Instruction:
    opening = _word("opening", i)
    prompt = f'Write one sentence about {_word("subject", i)}. Begin it with "{opening}"'
    return Instruction(prompt, (begins(opening), word_count(5)))


def _ends(i: int) -> Instruction:
    closing = _word("closing", i)
    prompt = (
        f"Write one sentence about {_word('subject', i)}. After it, end your answer with "
        f'"{closing}"'
    )
    return Instruction(prompt, (ends(closing), word_count(6)))


def _question(i: int) -> Instruction:
    prompt = f"Ask me one question about {_word('subject', i)}. Write only the question."
    return Instruction(prompt, (ends("?"), sentence_count(1, 1)))


def _exclamation(i: int) -> Instruction:
    prompt = (
        f"Praise {_word('subject', i)} in one sentence that ends with an exclamation mark. Write "
        "nothing else."
    )
    return Instruction(prompt, (ends("!"), sentence_count(1, 1)))


# ---- closed questions


def _yes_no(i: int) -> Instruction:
    return Instruction(f'{_word("yes_no", i)} Answer only "yes" or "no".', (one_of("yes", "no"),))


def _choice(i: int) -> Instruction:
    quality, _, listed = _word("choice", i).partition(": ")
    options = listed.split(", ")
    prompt = (
        f"Which is the {quality}: {options[0]}, {options[1]} or {options[2]}? Answer with exactly "
        "one of these three words and nothing else."
    )
    return Instruction(prompt, (one_of(*options),))


def _digits(i: int) -> Instruction:
    prompt = f"{_word('digits', i)} Answer with digits only."
    return Instruction(prompt, (matches(r"\d[\d,]*", "digits"),))


def _date(i: int) -> Instruction:
    written = _word("day", i)
    day, month, year = written.split(" ")
    iso = f"{year}-{MONTHS.index(month) + 1:02d}-{int(day):02d}"
    prompt = f"Write the date {written} in the form YYYY-MM-DD and nothing else."
    return Instruction(prompt, (one_of(iso),))


# ---- data and typography


def _json_object(i: int) -> Instruction:
    keys, _, of_what = _word("facts", i).partition(" of ")
    first, second = keys.split(", ")
    prompt = (
        f"Give the {first} and the {second} of {of_what} as a JSON object with the keys "
        f'"{first}" and "{second}", both with text as value. Answer with the JSON only.'
    )
    return Instruction(prompt, (json_object(**{first: str, second: str}),))


def _json_list(i: int) -> Instruction:
    n = 3 + i % 3
    prompt = (
        f"Name {NUMBER_WORDS[n]} {_word('category', i)} as a JSON array of strings. Answer with "
        "the JSON only."
    )
    return Instruction(prompt, (json_list(n, str),))


def _quoted(i: int) -> Instruction:
    prompt = (
        f"Write a short motto about {_word('subject', i)}. Put the whole answer in double "
        "quotation marks."
    )
    return Instruction(prompt, (matches(r"[\"“][^\"“”]+[\"”]", "one text in quotation marks"),))


def _title(i: int) -> Instruction:
    prompt = (
        f"Write a title for a story about {_word('subject', i)}, in double angle brackets, like "
        "<<title>>, and nothing else."
    )
    return Instruction(prompt, (matches(r"<<[^<>\n]+>>", "a title in << >>"),))


def _language(i: int) -> Instruction:
    name = ("French", "German", "Spanish", "Italian")[i % 4]
    prompt = f"Write two short sentences about {_word('subject', i)} in {name}."
    return Instruction(prompt, (language(name.lower()), word_count(5)))


KINDS: dict[str, Callable[[int], Instruction]] = {
    "few_words": _few_words,
    "exact_words": _exact_words,
    "one_word": _one_word,
    "one_sentence": _one_sentence,
    "sentences": _sentences,
    "bullets": _bullets,
    "numbered": _numbered,
    "lines": _lines,
    "separated": _separated,
    "capital_lines": _capital_lines,
    "lowercase": _lowercase,
    "uppercase": _uppercase,
    "keywords": _keywords,
    "without_word": _without_word,
    "without_letter": _without_letter,
    "no_commas": _no_commas,
    "repeated_word": _repeated_word,
    "begins": _begins,
    "ends": _ends,
    "question": _question,
    "exclamation": _exclamation,
    "yes_no": _yes_no,
    "choice": _choice,
    "digits": _digits,
    "date": _date,
    "json_object": _json_object,
    "json_list": _json_list,
    "quoted": _quoted,
    "title": _title,
    "language": _language,
}


@cache
def instructions() -> dict[str, Instruction]:
    """All instructions by the id of their item ("date-07").

    Number by number, so that the first 30 n items hold n of every kind (--task-limit).
    """
    found = {}
    for i in range(PER_KIND):
        for kind, make in KINDS.items():
            found[f"{kind}-{i:02d}"] = make(i)
    return found


def judge(item: Item, answer: str) -> Verdict:
    """Whether the answer meets all constraints; the reason lists its faults."""
    found = [check(answer) for check in instructions()[item.id].checks]
    faults = [fault for fault in found if fault is not None]
    follows = bool(answer.strip()) and not faults
    return {"follows": follows}, "; ".join(faults)


def load(file: Path | None, paper: bool) -> tuple[list[Item], str]:
    """The 900 prompts, and a hash of them."""
    prompts = [(name, instruction.prompt) for name, instruction in instructions().items()]
    items = []
    for name, prompt in prompts:
        message = {"role": "user", "content": prompt}
        items.append(Item(name, (message,)))
    return items, sha256(repr(prompts))


INSTRUCTIONS_900 = Task(
    name="instructions_900",
    scorers=("follows",),
    load=load,
    judge=judge,
    max_new_tokens=MAX_NEW_TOKENS,
)
