"""Scorers against the plain forward and against each other; batches; sharded rounds."""

import random
from types import SimpleNamespace

import pytest
import torch

from engine.measure.likelihood import (
    BATCH_TOKENS,
    PackedScorer,
    Scorer,
    ScoringRequest,
    collective_rounds,
    nll,
    scorer_for,
    scoring_batches,
)
from engine.measure.scoring_parts import halves, pieces_of, tokens_of
from kernels.registry import NATIVE, TORCH
from model.llama import Llama
from tests.helpers.adapters import new_lora


@pytest.fixture
def tiny(tiny_llama_dir):
    return Llama.from_pretrained(tiny_llama_dir())


def random_tokens(rng, count):
    return [rng.randrange(320) for _ in range(count)]


def scoring_requests(count=9, seed=0):
    """Prompts of which every second has a common prefix; 1 to 4 answers of 0 to 70 tokens."""
    rng = random.Random(seed)
    prefix = random_tokens(rng, 80)
    requests = []
    for i in range(count):
        own = random_tokens(rng, rng.randint(1, 60))
        prompt = [*prefix, *own] if i % 2 else own
        lengths = [rng.choice((0, 1, 5, 70)) for _ in range(rng.randint(1, 4))]
        answers = [random_tokens(rng, length) for length in lengths]
        requests.append(ScoringRequest(str(i), prompt, answers))
    return requests


def flat(scores):
    """[request][answer][token] as one list."""
    values = []
    for answers in scores:
        for answer in answers:
            values += answer
    return values


def answer_lengths(scores):
    """The number of tokens: [request][answer]."""
    return [list(map(len, answers)) for answers in scores]


def test_scores_under_an_adapter_equal_the_plain_forward(tiny_llama_dir):
    """Nats and greedy flags of several answers behind one context."""
    model = Llama.from_pretrained(tiny_llama_dir())
    lora = new_lora(model, rank=2, alpha=64)
    lora.params.add_(torch.randn(lora.params.shape) * 0.3)
    model.bind(lora)
    prompt = [1, 2, 3, 4, 5]
    likeliest = int(model.logits(torch.tensor(prompt), lora)[-1].argmax())
    answers = [[7], [8, 9, 10], [likeliest]]
    with Scorer(model, [prompt], lora=lora) as scorer:
        (answer_scores,) = scorer.token_scores([ScoringRequest("x", prompt, answers)])
    for answer, scores in zip(answers, answer_scores, strict=True):
        logits = model.logits(torch.tensor([*prompt, *answer]), lora)  # (T, V)
        logprobs = torch.log_softmax(logits.double(), -1)[len(prompt) - 1 : -1]  # (A, V)
        targets = torch.tensor(answer)
        nats = -logprobs.gather(1, targets[:, None])[:, 0]
        greedy = logprobs.argmax(-1) == targets
        torch.testing.assert_close(torch.tensor([score.nats for score in scores]), nats.float())
        assert [score.greedy for score in scores] == greedy.tolist()
    assert answer_scores[2][0].greedy


def test_both_scorers_equal_the_plain_forward_whatever_is_scored_together(tiny):
    """In fp32 on a CPU a score has the same bits whatever is scored with it."""
    requests = scoring_requests()
    with Scorer(tiny, [request.prompt for request in requests]) as scorer:
        together = scorer.losses(requests)
        assert [scorer.losses([request])[0] for request in requests] == together
        assert len(scorer.cache.free) == scorer.cache.pages - 2, "all but the prefix's pages"
    with PackedScorer(tiny) as scorer:
        packed = scorer.losses(requests)
        assert scorer.losses([]) == []
    plain = []  # nats of all answer tokens
    for request in requests:
        for answer in request.answers:
            if answer:
                plain += nll(tiny, request.prompt, answer).tolist()
    lengths = answer_lengths(request.answers for request in requests)
    for scores in (together, packed):
        assert answer_lengths(scores) == lengths
        assert flat(scores) == pytest.approx(plain, rel=1e-5, abs=1e-6)


def test_batches_hold_whole_requests_of_a_bounded_number_of_tokens():
    assert BATCH_TOKENS == {"cpu": 1024, "cuda": 8192}
    lengths = {"a": 50, "b": 50, "c": 1, "long": 200, "d": 1}
    requests = [ScoringRequest(name, [1] * length, [[]]) for name, length in lengths.items()]
    ids = []
    for batch in scoring_batches(requests, 100):
        ids.append([request.id for request in batch])
    assert ids == [["a", "b"], ["c"], ["long"], ["d"]]
    assert list(scoring_batches([], 100)) == []


def test_sharded_weights_take_as_many_forwards_as_the_busiest_process(tiny):
    world = SimpleNamespace(max_over_ranks=lambda rounds: max(rounds, 5))
    assert collective_rounds(SimpleNamespace(is_sharded=True), world, 3) == 5
    assert collective_rounds(tiny, world, 3) == 3
    assert isinstance(scorer_for(tiny, []), Scorer)
    assert isinstance(scorer_for(SimpleNamespace(is_sharded=True), []), PackedScorer)


def test_halves_of_a_batch_keep_the_order_and_every_first_answer():
    """Down to one request with one or two answers; an answer that is in both is dropped once."""
    answers = [[n] for n in range(1, 6)]
    batch = [ScoringRequest("a", [1, 2], answers), ScoringRequest("b", [3], [[4]])]
    waiting, smallest = [pieces_of(batch)], []
    while waiting:
        part = waiting.pop()
        both = halves(part)
        waiting += reversed(both)
        if not both:
            smallest += part
    found = [(piece.place, piece.request.answers[piece.again :]) for piece in smallest]
    assert found == [(0, [[1], [2]]), (0, [[3]]), (0, [[4]]), (0, [[5]]), (1, [[4]])]
    assert all(piece.request.answers[0] == [1] for piece in smallest[:4])
    assert tokens_of(pieces_of(batch)) == 7 + 2


@pytest.mark.parametrize("ops", [NATIVE, TORCH], ids=["native", "torch"])
def test_scores_in_the_smallest_parts_have_the_same_bits(tiny_llama_dir, ops):
    model = Llama.from_pretrained(tiny_llama_dir(), ops=ops)
    rng = random.Random(3)
    requests = []
    for count in (3, 1, 2, 5):
        answers = [random_tokens(rng, rng.randint(1, 30)) for _ in range(count)]
        requests.append(ScoringRequest(str(count), random_tokens(rng, 50), answers))
    prompts = [request.prompt for request in requests]
    with Scorer(model, prompts, page_size=16) as scorer:
        whole = scorer.token_scores(requests)
    with Scorer(model, prompts, page_size=16) as scorer:
        scorer.most_tokens = 1
        assert scorer.token_scores(requests) == whole


def test_a_batch_that_ran_out_of_memory_leaves_no_page_taken(tiny, monkeypatch):
    requests = scoring_requests()
    forward = Scorer._forward
    calls = []

    def refused(self, rows):
        calls.append(len(rows))
        if len(calls) in (2, 4):  # of all rows, and of some answers behind their prompts
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, rows)

    prompts = [request.prompt for request in requests]
    with Scorer(tiny, prompts) as scorer:
        whole = scorer.token_scores(requests)
    monkeypatch.setattr(Scorer, "_forward", refused)
    with Scorer(tiny, prompts) as scorer:
        assert scorer.token_scores(requests) == whole
        assert len(scorer.cache.free) + len(scorer.prefix_pages) == scorer.cache.pages
        assert scorer.prefix_pages and scorer.most_tokens < sum(r.tokens for r in requests)
