"""Stopping conditions and draft tokens, each against the plain form of itself."""

import random
from types import SimpleNamespace

import pytest

from engine.sampling.requests import Request
from engine.sampling.sequence import (
    RunningSequence,
    StopConditions,
    _completion,
    find_stop_string,
)
from engine.sampling.speculation import MAX_DRAFT, MAX_MATCH, DraftController, Drafter


def new_sequence(most):
    request = Request("a", [1, 2])
    return RunningSequence(request, (1, 2), most, most, 0, [], 2, None)


def append_one_by_one(seq, tokens, logprobs, end_ids, stop, decode):
    """The definition: after every token an end token, a stop string, the limit."""
    for count, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True), start=1):
        seq.token_ids.append(token)
        seq.logprobs.append(logprob)
        ids = seq.token_ids
        stopped = find_stop_string(ids, stop, decode)
        if token in end_ids:
            seq.completion = _completion(seq, ids[:-1], decode(ids[:-1]), "stop")
        elif stopped is not None:
            kept = ids[: stopped.kept_tokens]
            seq.completion = _completion(seq, kept, stopped.text, "stop_string")
        elif len(ids) >= seq.max_new_tokens:
            seq.completion = _completion(seq, ids[:], decode(ids), "length")
        if seq.completion is not None:
            return count
    return len(tokens)


def tokens_and_decode(rng):
    """Few tokens with 0 to 3 bytes, parts of characters among them; a tokenizer's decoding."""
    characters = "ab \n\N{LATIN SMALL LETTER E WITH ACUTE}\N{EURO SIGN}".encode()
    pieces = []
    for _ in range(12):
        start = rng.randrange(len(characters))
        pieces.append(characters[start : start + rng.choice((0, 1, 1, 2, 2, 3))])
    strips_space = rng.random() < 0.5

    def decode(ids):
        data = b"".join(pieces[id] for id in ids)
        if strips_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    return range(len(pieces)), decode


@pytest.mark.parametrize("seed", range(8))
def test_tokens_of_a_visit_end_where_they_would_one_by_one(seed):
    """Ids, log-probabilities, text and reason: end tokens, stop strings of whole and divided
    characters, limits, in visits of several lengths."""
    rng = random.Random(seed)
    finishes = set()
    for _ in range(120):
        vocabulary, decode = tokens_and_decode(rng)
        letters = "ab \n\N{LATIN SMALL LETTER E WITH ACUTE}\N{REPLACEMENT CHARACTER}\N{EURO SIGN}"
        stop = []
        for _ in range(rng.choice((0, 1, 2, 3))):
            stop.append("".join(rng.choice(letters) for _ in range(rng.choice((1, 2, 3, 4)))))
        end_ids = rng.choice(((), (), (3,), (3, 4)))
        most = rng.randint(1, 30)
        conditions = StopConditions(end_ids, stop, decode)
        ours, definition = new_sequence(most), new_sequence(most)
        while definition.completion is None:
            tokens = [rng.choice(vocabulary) for _ in range(rng.choice((1, 3, 8)))]
            logprobs = [rng.random() for _ in tokens]
            count = append_one_by_one(definition, tokens, logprobs, end_ids, stop, decode)
            assert conditions.append(ours, tokens, logprobs) == count
            assert ours.completion == definition.completion
            assert ours.token_ids == definition.token_ids
            assert ours.logprobs == definition.logprobs
        finishes.add(ours.completion.finish)
    assert finishes == {"stop", "stop_string", "length"}


def test_a_token_that_cannot_complete_a_stop_string_is_not_decoded():
    """One decoding for each of the vocabulary; then only behind tokens with a line's end."""
    calls = []

    def decode(ids):
        calls.append(len(ids))
        return "".join("\n" if id == 9 else "x" for id in ids)

    conditions = StopConditions((), ("\n\n",), decode)
    seq = new_sequence(1000)
    conditions.append(seq, [1, 2, 9, 3] * 50, [0.0] * 200)
    assert len(calls) == 4 + 50, "four tokens are looked at, and 50 line ends"
    conditions.append(seq, [9, 9, 1], [0.0] * 3)
    assert seq.completion.finish == "stop_string" and len(seq.token_ids) == 202


# ---- draft tokens


def choose_by_walking(controller, matches, offered, replayed):
    """The definition: every offered draft token in turn, the likeliest first."""
    sequences = len(matches)
    cost = controller._fit()
    plain_seconds = cost.a + (cost.b + cost.c) * sequences + (cost.s if replayed else 0.0)
    best_rate = controller.GAIN * sequences / max(plain_seconds, controller.LEAST)
    best = []
    candidates = []
    for i, (match, count) in enumerate(zip(matches, offered, strict=True)):
        reached = 1.0
        for depth in range(count):
            m = min(match, MAX_MATCH)
            reached *= float(controller.accepted[m][depth] / controller.proposed[m][depth])
            candidates.append((-reached, depth, i))
    candidates.sort()
    for width in controller.WIDTHS:
        fitting = [candidate for candidate in candidates if candidate[1] <= width - 2]
        fixed_seconds = cost.a + cost.c * sequences * width
        expected_tokens = float(sequences)
        for n, (minus_reached, _, _) in enumerate(fitting, start=1):
            expected_tokens -= minus_reached
            rate = expected_tokens / (fixed_seconds + cost.b * (sequences + n))
            if rate > best_rate:
                best_rate = rate
                best = fitting[:n]
    return [sum(i == owner for _, _, owner in best) for i in range(sequences)]


@pytest.mark.parametrize("seed", range(4))
def test_the_controller_takes_the_draft_tokens_that_a_walk_over_them_finds(seed):
    rng = random.Random(seed)
    controller = DraftController()
    taken = 0
    for _ in range(60):
        for _ in range(rng.randrange(4)):
            tokens = rng.randint(1, 200)
            seconds = 0.01 + rng.choice((1e-5, 1e-3)) * tokens * rng.random()
            area = tokens * rng.randint(1, 3)
            controller.record_step(tokens, area, seconds, rng.random() < 0.5)
            drafted = rng.randint(1, MAX_DRAFT)
            controller.record_acceptance(rng.randint(0, 12), drafted, rng.randint(0, drafted))
        sequences = rng.choice((1, 2, 9, 40))
        matches = [rng.randint(0, 12) for _ in range(sequences)]
        offered = [rng.choice((0, 3, MAX_DRAFT)) for _ in range(sequences)]
        replayed = rng.random() < 0.5
        want = choose_by_walking(controller, matches, offered, replayed)
        assert controller.choose(matches, offered, replayed) == want
        taken += sum(want)
    assert taken > 100


def test_a_no_of_the_controller_holds_for_twenty_visits_of_as_many_sequences():
    controller = DraftController()
    asked = []
    choose = controller.choose
    answers = SimpleNamespace(yes=False)

    def noted(matches, offered, replayed=False):
        asked.append(len(matches))
        return [1] if answers.yes else choose(matches, [0] * len(offered), replayed)

    controller.choose = noted
    assert not controller.pays_off(40) and asked == [40]
    assert controller.is_paused(40) and controller.is_paused(99) and not controller.is_paused(39)
    for _ in range(controller.PAUSE):
        assert not controller.pays_off(50)
        controller.count_visit()
    assert asked == [40] and not controller.is_paused(40)
    answers.yes = True
    assert controller.pays_off(40) and asked == [40, 40] and not controller.is_paused(40)


def test_a_drafter_that_catches_up_is_where_it_would_be_token_by_token():
    rng = random.Random(0)
    for _ in range(50):
        reference = [rng.randrange(5) for _ in range(20)]
        late, prompt = Drafter(reference), Drafter(reference)
        tokens = []
        for _ in range(20):
            for _ in range(rng.randrange(6)):
                tokens.append(rng.randrange(5))
                prompt.extend(tokens[-1])
            late.catch_up(tokens)
            assert late.propose(12) == prompt.propose(12) and late.match == prompt.match
