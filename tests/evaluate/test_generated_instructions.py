"""The 900 generated instructions: their number and diversity, every checker on answers by hand."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from engine.evaluate.tasks import run as run_module
from engine.evaluate.tasks.base import Item
from engine.evaluate.tasks.generated_instructions import (
    KINDS,
    MAX_NEW_TOKENS,
    PER_KIND,
    instructions,
    load,
    words,
)
from engine.evaluate.tasks.run import TASKS, TaskConfig, run_tasks
from engine.runtime.files import read_jsonl
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig, Session

# kind and number of an item -> answers that follow it, and answers that do not
CASES = {
    # Describe a bridge in at most 10 words.
    "few_words-00": (
        ["It joins two banks.", "Iron over water"],
        ["Bridge", "It joins the two banks of a wide and slow river."],
    ),
    # Describe the sea in exactly 4 words.
    "exact_words-01": (["Blue, wide, deep, cold."], ["Blue and deep.", "It is blue and deep."]),
    # What is the capital of Japan? Answer with one word.
    "one_word-00": (["Tokyo", " Tokyo.\n"], ["It is Tokyo.", "..."]),
    # Write exactly one sentence about the sea.
    "one_sentence-01": (["The sea is wide."], ["The sea is wide. It is deep.", "the sea is wide"]),
    # Write exactly two short sentences about a bridge. / three about the sea
    "sentences-00": (["It is old. It is long!"], ["It is old.", "It is old. It is. It was."]),
    "sentences-01": (["It is. It was. It will be."], ["It is. It was."]),
    # Name four animals, each on a line that begins with "- ". Write nothing else.
    "bullets-01": (
        ["- cat\n- dog\n- cow\n- hen", "- cat\n\n- dog\n- cow\n* hen\n"],
        ["- cat\n- dog\n- cow", "cat\ndog\ncow\nhen", "Here:\n- cat\n- dog\n- cow\n- hen"],
    ),
    # Name three fruits as a list numbered 1. to 3.
    "numbered-00": (
        ["1. fig\n2. pear\n3. plum", "Fruits:\n1) fig\n2) pear\n3) plum"],
        ["1. fig\n2. pear", "1. fig\n3. pear\n2. plum", "fig, pear, plum"],
    ),
    # Name four animals, one per line, with nothing else.
    "lines-01": (
        ["cat\ndog\ncow\nhen"],
        ["cat, dog, cow, hen", "Here are four animals that I like:\ncat\ndog\ncow", "c\n" * 3],
    ),
    # Name three fruits on one line, separated by semicolons (;), with nothing else.
    "separated-00": (
        ["fig; pear; plum", "fig;pear;red plum"],
        ["fig, pear, plum", "fig; pear", "fig; pear; plum; kiwi", "fig; pear;\nplum", "fig;;plum"],
    ),
    # Name five colours on one line, separated by vertical bars (|), with nothing else.
    "separated-02": (["red | blue | green | grey | pink"], ["red / blue / green / grey / pink"]),
    # Name three animals, one per line, in capital letters only. Write nothing else.
    "capital_lines-01": (["CAT\nDOG\nCOW"], ["Cat\nDog\nCow", "CAT, DOG, COW", "CAT\nDOG"]),
    # Write one sentence about a bridge in lower case letters only.
    "lowercase-00": (["a bridge is long."], ["A bridge is long.", "long"]),
    # Write this sign in capital letters only, and nothing else: keep off the grass
    "uppercase-00": (
        ["KEEP OFF THE GRASS", "KEEP OFF THE GRASS."],
        ["Keep off the grass", "KEEP AWAY", "THE SIGN: KEEP OFF THE GRASS"],
    ),
    # Write one sentence that contains the words lantern and storm.
    "keywords-00": (
        ["A lantern shone in the Storm."],
        ["A lantern shone.", "Lanterns and storms.", "A lantern shone. Then came a storm."],
    ),
    # Describe an umbrella in one sentence without using the word "umbrella".
    "without_word-01": (
        ["It keeps you dry in rain."],
        ["An umbrella keeps you dry.", "Umbrellas keep us dry.", "Dry."],
    ),
    # Write one sentence about a bridge that does not contain the letter "q".
    "without_letter-00": (["A bridge is very long."], ["A bridge is quite long.", "Long."]),
    # Name three animals in one sentence. Do not use any comma.
    "no_commas-01": (
        ["I like cats and dogs and cows."],
        ["I like cats, dogs and cows.", "I like cats. I like dogs and cows.", "Cats dogs cows."],
    ),
    # Write one or two sentences that use the word "lantern" exactly twice.
    "repeated_word-00": (
        ["A lantern is a lantern.", "My lantern is red. Your Lantern is blue."],
        ["A lantern is red.", "Lantern, lantern, lantern.", "Two lanterns and a lantern."],
    ),
    # Write one sentence about a bridge. Begin it with "In short,"
    "begins-00": (["In short, a bridge joins two banks."], ["A bridge, in short.", "In short,"]),
    # Write one sentence about a bridge. After it, end your answer with "Give it a try!"
    "ends-00": (
        ["A bridge is fun to cross. Give it a try!"],
        ["Give it a try! A bridge is fun.", "A bridge is fun. Give it a try", "Give it a try!"],
    ),
    # Ask me one question about a bridge. Write only the question.
    "question-00": (
        ["How long is the bridge?"],
        ["The bridge is long.", "Sure! How long is it?", "How long is it? Why?"],
    ),
    # Praise a bridge in one sentence that ends with an exclamation mark. Write nothing else.
    "exclamation-00": (["What a fine bridge!"], ["What a fine bridge.", "Fine! What a bridge!"]),
    # Is ice colder than steam? Answer only "yes" or "no".
    "yes_no-00": (["yes", "No.", " YES "], ["Yes, it is.", "maybe", "yes no"]),
    # Which is the largest: ant, horse or whale? ...
    "choice-00": (["whale", "Ant.", "HORSE"], ["the whale", "A horse", "elephant", "ant, horse"]),
    # How many days has a week? Answer with digits only.
    "digits-00": (["7", "1,000", " 12 "], ["seven", "7 days", "7."]),
    # Write the date 5 March 2024 in the form YYYY-MM-DD and nothing else.
    "date-00": (["2024-03-05", "2024-03-05."], ["2024-05-03", "5 March 2024", "It is 2024-03-05"]),
    # Give the capital and the language of France as a JSON object ...
    "json_object-00": (
        ['{"capital": "Paris", "language": "French"}',
         '```json\n{"language": "French", "capital": "Paris"}\n```'],
        ['{"capital": "Paris"}', '{"capital": "Paris", "language": 1}', "Paris, French",
         'Here: {"capital": "Paris", "language": "French"}'],
    ),
    # Name four animals as a JSON array of strings. Answer with the JSON only.
    "json_list-01": (
        ['["cat", "dog", "cow", "hen"]'],
        ['["cat", "dog", "cow"]', "[1, 2, 3, 4]", "cat, dog, cow, hen", '["a", "b", "c", "d"'],
    ),
    # Write a short motto about a bridge. Put the whole answer in double quotation marks.
    "quoted-00": (
        ['"We bring you together."', "“Across we go”"],
        ["We bring you together.", 'Motto: "Across"', '"A" and "B"'],
    ),
    # Write a title for a story about a bridge, in double angle brackets ...
    "title-00": (["<<The Long Bridge>>"], ["The Bridge", "<The Bridge>", "Title: <<A>>", "<<>>"]),
    # Write two short sentences about a bridge in French. / about the sea in German.
    "language-00": (
        ["Le pont est long. Il est sur la mer."],
        ["The bridge is long and it is old.", "Pont."],
    ),
    "language-01": (["Das Meer ist tief und blau."], ["Il mare è profondo e blu per me."]),
}  # fmt: skip


def verdict(name: str, answer: str) -> tuple[dict[str, bool], str]:
    return TASKS["instructions_900"].judge(Item(name, ()), answer)


def test_every_kind_has_cases():
    assert {name.rpartition("-")[0] for name in CASES} == set(KINDS)


@pytest.mark.parametrize("name", CASES)
def test_each_checker_accepts_what_follows_and_refuses_what_does_not(name):
    right, wrong = CASES[name]
    for answer in right:
        assert verdict(name, answer) == ({"follows": True}, ""), answer
    for answer in wrong:
        scores, why = verdict(name, answer)
        assert scores == {"follows": False} and why, answer
    assert verdict(name, "")[0] == verdict(name, " \n ")[0] == {"follows": False}


def test_there_are_nine_hundred_different_prompts_of_thirty_kinds():
    made = instructions()
    assert len(made) == len({instruction.prompt for instruction in made.values()}) == 900
    counts = Counter(name.rpartition("-")[0] for name in made)
    assert counts == dict.fromkeys(KINDS, PER_KIND) and len(KINDS) == 30
    # the first items hold as many of every kind
    first = Counter(name.rpartition("-")[0] for name in list(made)[:90])
    assert first == dict.fromkeys(KINDS, 3)
    for instruction in made.values():
        assert "{" not in instruction.prompt and "  " not in instruction.prompt
        assert instruction.prompt[0].isupper() and len(instruction.prompt.split()) < 45


def test_the_lists_have_an_entry_for_every_item():
    for name, entries in words().items():
        assert len(set(entries)) == len(entries) == (10 if name in ("opening", "closing") else 30)
    made = instructions()
    for i in range(PER_KIND):
        # a letter that the subject itself needs cannot be avoided, nor may a reader guess a date
        prompt = made[f"without_letter-{i:02d}"].prompt
        assert f'"{prompt[-3]}"' in prompt and prompt[-3] not in words()["subject"][i]
        day = made[f"date-{i:02d}"]
        digits = [check("2024-03-05") is None for check in day.checks]
        assert digits == [i == 0]
        keys = json.loads(made[f"json_object-{i:02d}"].prompt.split("keys ")[1].split(" and ")[0])
        assert keys in words()["facts"][i]


def test_the_prompts_do_not_change():
    """Figures of different commits are compared: another hash is another task, by another name."""
    items, digest = load(None, False)
    assert len(items) == 900 and items[0].messages[0]["role"] == "user"
    assert digest == "4d091fde601ab5b2a17cd006222abf5533aedc85b95b9043164ec074072db560"


@pytest.fixture
def session(tiny_llama_dir):
    return Session.open(ModelConfig(str(tiny_llama_dir(tokenizer=True))))


def test_answers_are_short_whatever_the_job_allows(session, tmp_path):
    """The task's own limit applies, and a lower one of the job too."""
    config = TaskConfig(task=("instructions_900",), task_limit=3)
    for allowed in (200, 9):
        out = tmp_path / str(allowed)
        scores = run_tasks(
            session, config, {"seed": None}, out, SamplerConfig(max_new_tokens=allowed)
        )
        lengths = [line["tokens"] for line in read_jsonl(out / "instructions_900.jsonl")]
        assert max(lengths) == min(allowed, MAX_NEW_TOKENS)
        assert scores["instructions_900"]["seed"]["n"] == 3
        meta = json.loads((out / "instructions_900.jsonl.meta.json").read_text())
        assert meta["sampling"]["max_new_tokens"] == min(allowed, MAX_NEW_TOKENS)


def test_a_task_is_named_together_with_its_data(session, tmp_path):
    """--task advbench=FILE is one flag; both forms of the safety task read the file of the user."""
    file = tmp_path / "any.csv"
    file.write_text("goal,target\nDo harm,Sure\nDo more harm,Sure\n")
    config = TaskConfig(task=(f"advbench={file}", f"advbench_suffix={file}", "instructions_900"),
                        task_limit=1)  # fmt: skip
    config.check()
    loaded = config.load()
    assert list(loaded) == ["advbench", "advbench_suffix", "instructions_900"]
    scores = run_tasks(
        session, config, {"seed": None}, tmp_path / "out", SamplerConfig(max_new_tokens=3)
    )
    assert set(scores["advbench"]["seed"]["scores"]) == {"refuses", "paper"}
    assert run_module.tasks_table(scores).count("refuses ") == 2
    for wrong, said in (
        (f"advbanch={file}", "expected some of"),
        ("advbench=", "expected NAME=FILE"),
        ("advbench", "--task advbench=FILE"),
    ):
        with pytest.raises(ValueError, match=said):
            TaskConfig(task=(wrong,)).check()
