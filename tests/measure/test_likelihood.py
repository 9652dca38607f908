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
from model.llama import Llama
from tests.helpers.adapters import new_lora


@pytest.fixture
def tiny(tiny_llama_dir):
    return Llama.from_pretrained(tiny_llama_dir())


def scoring_requests(count=9, seed=0):
    """Prompts of which every second has a common prefix; 1 to 4 answers of 0 to 70 tokens."""
    rng = random.Random(seed)
    prefix = [rng.randrange(320) for _ in range(80)]
    requests = []
    for i in range(count):
        prompt = prefix * (i % 2) + [rng.randrange(320) for _ in range(rng.randint(1, 60))]
        lengths = [rng.choice((0, 1, 5, 70)) for _ in range(rng.randint(1, 4))]
        answers = [[rng.randrange(320) for _ in range(n)] for n in lengths]
        requests.append(ScoringRequest(str(i), prompt, answers))
    return requests


def flat(scores):
    return [value for answers in scores for answer in answers for value in answer]


def test_the_scorer_with_an_adapter_is_the_plain_forward(tiny_llama_dir):
    """Nats and greedy flags of several answers behind one context, under an adapter."""
    model = Llama.from_pretrained(tiny_llama_dir())
    lora = new_lora(model, rank=2, alpha=64)
    lora.params.add_(torch.randn(lora.params.shape) * 0.3)
    model.bind(lora)
    prompt, answers = [1, 2, 3, 4, 5], [[7], [8, 9, 10], []]
    best = int(model.logits(torch.tensor(prompt), lora)[-1].argmax())
    answers[2] = [best]
    with Scorer(model, [prompt], lora=lora) as scorer:
        (judged,) = scorer.token_scores([ScoringRequest("x", prompt, answers)])
    for answer, pairs in zip(answers, judged, strict=True):
        logits = model.logits(torch.tensor([*prompt, *answer]), lora)
        logprobs = torch.log_softmax(logits.double(), -1)[len(prompt) - 1 : -1]
        wanted = -logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor([p[0] for p in pairs]), wanted.float())
        assert [p[1] for p in pairs] == (logprobs.argmax(-1) == torch.tensor(answer)).tolist()
    assert judged[2][0][1]


def test_both_scorers_are_the_plain_forward(tiny):
    """And in fp32 on a CPU a score has the same bits whatever is scored with it."""
    requests = scoring_requests()
    with Scorer(tiny, [request.prompt for request in requests]) as scorer:
        together = scorer.losses(requests)
        assert [scorer.losses([request])[0] for request in requests] == together
        assert len(scorer.cache.free) == scorer.cache.pages - 2, "all but the prefix's pages"
    with PackedScorer(tiny) as scorer:
        packed = scorer.losses(requests)
        assert scorer.losses([]) == []
    plain = []
    for request in requests:
        plain.append([nll(tiny, request.prompt, a).tolist() if a else [] for a in request.answers])
    for scores in (together, packed):
        lengths = [[len(answer) for answer in answers] for answers in scores]
        assert lengths == [[len(answer) for answer in request.answers] for request in requests]
        assert flat(scores) == pytest.approx(flat(plain), rel=1e-5, abs=1e-6)


def test_batches_hold_whole_requests_of_a_bounded_number_of_tokens():
    half, whole = [1] * (BATCH_TOKENS // 2), [1] * (2 * BATCH_TOKENS)
    sizes = {"a": half, "b": half, "c": [1], "long": whole, "d": [1]}
    requests = [ScoringRequest(name, prompt, [[]]) for name, prompt in sizes.items()]
    batches = [[request.id for request in batch] for batch in scoring_batches(requests)]
    assert batches == [["a", "b"], ["c"], ["long"], ["d"]]
    assert list(scoring_batches([])) == []


def test_sharded_weights_take_as_many_forwards_as_the_busiest_process(tiny):
    world = SimpleNamespace(max_over_ranks=lambda rounds: max(rounds, 5))
    assert collective_rounds(SimpleNamespace(is_sharded=True), world, 3) == 5
    assert collective_rounds(tiny, world, 3) == 3
    assert isinstance(scorer_for(tiny, []), Scorer)
    assert isinstance(scorer_for(SimpleNamespace(is_sharded=True), []), PackedScorer)
