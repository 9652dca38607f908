"""Forty instructions of ours; a program checks whether an answer follows them

Each asks for something easy under one or two constraints of form; an answer follows an instruction
when it meets all of them. The idea is IFEval's (Zhou et al. 2023, "Instruction-Following Evaluation
for Large Language Models"); prompts and checks are ours, so that scores compare arms with each
other and with nothing else.
"""

from __future__ import annotations

from pathlib import Path

from engine.evaluate.tasks.base import Item, Task, Verdict
from engine.evaluate.tasks.constraints import (
    Check,
    begins,
    bullet_count,
    csv_rows,
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
    paragraph_count,
    sentence_count,
    uppercase,
    without_character,
    word_count,
)
from engine.runtime.files import sha256

# name -> prompt, and the constraints that it asks for
PROMPTS: dict[str, tuple[str, tuple[Check, ...]]] = {
    "short": ("Explain in at most 30 words why the sky is blue.", (word_count(5, 30),)),
    "long": ("Describe a forest in autumn in at least 120 words.", (word_count(120),)),
    "exact_words": ("Describe the sea in exactly five words.", (word_count(5, 5),)),
    "one_word": ("What is the capital of Japan? Answer with one word.", (word_count(1, 1),)),
    "one_sentence": ("Say in one sentence what a bridge is.", (sentence_count(1, 1),)),
    "three_sentences": ("Describe your ideal breakfast in 3 sentences.", (sentence_count(3, 3),)),
    "two_paragraphs": (
        "Write two paragraphs about bees, with a blank line between them and no title.",
        (paragraph_count(2),),
    ),
    "five_bullets": (
        'List five things to pack for a hike, each on a line that begins with "- ".',
        (bullet_count(5),),
    ),
    "bullets_only": (
        'Name three colours, each on a line that begins with "- ". Write nothing else.',
        (bullet_count(3), line_count(3)),
    ),
    "numbered": (
        "Give four steps to make tea as a list numbered 1. to 4.",
        (numbered(4),),
    ),
    "lines": ("Write a poem about rain of exactly four lines.", (line_count(4),)),
    "lowercase": (
        "Tell me a fact about whales. Use lowercase letters only.",
        (lowercase(), word_count(4)),
    ),
    "uppercase": (
        "Write a sign that asks people to keep off the grass, in capital letters only.",
        (uppercase(),),
    ),
    "keywords": (
        "Write two sentences that contain the words lighthouse, storm and lantern.",
        (includes("lighthouse", "storm", "lantern"),),
    ),
    "without_word": (
        'Describe a cat without using the word "cat".',
        (excludes("cat", "cats"), word_count(5)),
    ),
    "without_letter": (
        'Write a sentence about the sun that does not contain the letter "z" or the letter "q".',
        (without_character("z", "q"), word_count(4)),
    ),
    "no_commas": (
        "Tell a story of three sentences about a lost key. Use no commas.",
        (without_character(","), sentence_count(3, 3)),
    ),
    "repeated_word": (
        'Write a short paragraph about winter that uses the word "snow" exactly three times.',
        (mentions("snow", 3, 3),),
    ),
    "begins": (
        'Explain what a map is. Begin your answer with "In short".',
        (begins("In short"), word_count(6)),
    ),
    "ends": (
        'Recommend a hobby. End your answer with the sentence "Give it a try!"',
        (ends("Give it a try!"), word_count(8)),
    ),
    "postscript": (
        'Write a short letter to a neighbour. After it, add a line that begins with "P.S."',
        (matches(r".{20,}\n\s*P\.S\. ?[^\n]+", "a letter with a last line of P.S."),),
    ),
    "question": ("Ask me one question about music. Write only the question.", (
        ends("?"), sentence_count(1, 1),
    )),
    "exclamations": (
        'Praise a good dog in three sentences, each ending with "!".',
        (matches(r"(?:[^.!?]+!\s*){3}", "three exclamations"),),
    ),
    "yes_no": ('Is ice colder than steam? Answer only "yes" or "no".', (one_of("yes", "no"),)),
    "choice": (
        "Which is the largest: an ant, a horse or a whale? Answer with exactly one of these three "
        "animals, without an article.",
        (one_of("ant", "horse", "whale"),),
    ),
    "number": ("How many days has a week? Answer with digits only.", (matches(r"\d+", "digits"),)),
    "date": (
        "Write the first day of the year 2000 in the form YYYY-MM-DD and nothing else.",
        (matches(r"\d{4}-\d{2}-\d{2}", "a date"),),
    ),
    "json": (
        'Describe a person as a JSON object with the keys "name" (text) and "age" (a number). '
        "Answer with the JSON only.",
        (json_object(name=str, age=int),),
    ),
    "json_list": (
        "Name four planets as a JSON array of strings. Answer with the JSON only.",
        (json_list(4, str),),
    ),
    "json_numbers": (
        "Give the first six even numbers above zero as a JSON array. Answer with the JSON only.",
        (json_list(6, int),),
    ),
    "csv": (
        "Give three fruits and their colours as CSV without a header: three lines of two cells, "
        "nothing else.",
        (csv_rows(3, 2),),
    ),
    "code_block": (
        "Write a Python function that adds two numbers. Answer with one code block in triple "
        "backticks and nothing else.",
        (matches(r"```[a-z]*\n(?:(?!```).)*def (?:(?!```).)*```", "one code block"),),
    ),
    "quoted": (
        "Give a proverb. Put the whole answer in double quotation marks.",
        (matches(r"[\"“][^\"“”]+[\"”]", "one text in quotation marks"),),
    ),
    "title": (
        "Write a short paragraph about trains. On a line of its own before it, put a title in "
        "double angle brackets, like <<title>>.",
        (matches(r"<<[^<>\n]+>>\s*\n.{20,}", "a title in << >> and a text"),),
    ),
    "separator": (
        "Write two different greetings, with a line of three asterisks (***) between them and "
        "nothing else.",
        (matches(r"[^*]+\n\s*\*\*\*\s*\n[^*]+", "two texts with *** between"),),
    ),
    "placeholder": (
        "Write an invitation to a party with a placeholder in square brackets for the date and "
        "another for the place, like [date].",
        (matches(r".*\[[^\[\]\n]+\].*\[[^\[\]\n]+\].*", "a text with two placeholders"),),
    ),
    "french": ("Décris la mer en deux ou trois phrases, en français.", (
        language("french"), word_count(6),
    )),
    "german": ("Describe a garden in two or three sentences, in German.", (
        language("german"), word_count(6),
    )),
    "spanish": ("Describe a market in two or three sentences, in Spanish.", (
        language("spanish"), word_count(6),
    )),
    "combined": (
        'Give three tips for better sleep as lines that begin with "- ". Use no commas, and end '
        'with the line "Sleep well."',
        (bullet_count(3), without_character(","), ends("Sleep well.")),
    ),
}  # fmt: skip


def judge(item: Item, answer: str) -> Verdict:
    """Whether the answer meets all constraints; the reason lists its faults."""
    _, checks = PROMPTS[item.id]
    found = [check(answer) for check in checks]
    faults = [fault for fault in found if fault is not None]
    follows = bool(answer.strip()) and not faults
    return {"follows": follows}, "; ".join(faults)


def load(file: Path | None, paper: bool) -> tuple[list[Item], str]:
    """The forty prompts, and a hash of them."""
    prompts = [(name, prompt) for name, (prompt, _) in PROMPTS.items()]
    items = []
    for name, prompt in prompts:
        message = {"role": "user", "content": prompt}
        items.append(Item(name, (message,)))
    return items, sha256(repr(prompts))


INSTRUCTIONS = Task(name="instructions", scorers=("follows",), load=load, judge=judge)
