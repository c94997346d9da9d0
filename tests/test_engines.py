"""What is written depends on model, request and seed alone, and is what the model says."""

import pytest
import torch

import tiny
from promptkd.evaluation.size_and_speed import REPEATS, size_and_speed
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import CoGenerator, TransformersEngine
from promptkd.teachers import prompt_vectors

STOP = (0, 17, 33, 50, 71)
NEVER = (-1,)
REQUESTS = [(40,), (11, 70, 25), (9, 8, 7, 6, 5, 4, 3), (60, 61), (30, 20, 10, 44, 12)]
SEEDS = [(0, index) for index in range(5)]


def language_model(architecture, seed=1, **options):
    return tiny.language_model(tiny.model(architecture, seed=seed, **options), tiny.ROWS)


def written(model, decoding, requests=REQUESTS, seeds=SEEDS, stop=STOP, **options):
    responses = TransformersEngine(model, stop).generate(requests, seeds, decoding, **options)
    return [response.token_ids for response in responses]


def logprobs_of(model, request, response):
    """Of each response token, from one pass over the whole text."""
    with torch.no_grad():
        logits = model.module(torch.tensor([request + response])).logits[0]
    return logits[len(request) - 1 : -1, : model.vocabulary].log_softmax(-1)


def generated(model, length, stop, **options):
    """Transformers' own generate on the left-padded requests, cut after the first stop token."""
    width = max(map(len, REQUESTS))
    tokens = torch.tensor([(tiny.PAD,) * (width - len(r)) + r for r in REQUESTS])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in REQUESTS])
    output = model.module.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=list(stop),
        pad_token_id=tiny.PAD,
        **options,
    )
    responses = []
    for row in output[:, width:].tolist():
        ends = [position for position, token in enumerate(row) if token in stop]
        responses.append(tuple(row[: ends[0] + 1] if ends else row))
    return responses


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_greedy_writing_equals_transformers_generate(architecture):
    model = language_model(architecture)
    decoding = GenerationSettings(16, temperature=0)
    free = written(model, decoding, stop=NEVER)
    stop = (free[0][3], free[3][1])  # so that some rows end early, at different times
    actual = written(model, decoding, stop=stop)
    assert actual == generated(model, 16, stop)
    assert len(set(map(len, actual))) > 1


def test_blocked_ngrams_equal_transformers_generate():
    model = language_model("gpt2")
    actual = written(model, GenerationSettings(24, temperature=0, no_repeat_ngram_size=2))
    assert actual == generated(model, 24, STOP, no_repeat_ngram_size=2)
    assert actual != written(model, GenerationSettings(24, temperature=0))


def test_blocked_ngrams_do_not_count_padding():
    model = language_model("llama")
    with torch.no_grad():
        model.module.lm_head.weight.zero_()  # every token is equally likely, so 0 is chosen
    decoding = GenerationSettings(4, temperature=0, no_repeat_ngram_size=2)
    requests, seeds = [(40, 41), (5, 6, 7, 8, 9, 10)], SEEDS[:2]
    together = written(model, decoding, requests, seeds, stop=(1,))
    alone = written(model, decoding, requests[:1], seeds[:1], stop=(1,))
    assert together[0] == alone[0] == (0, 0, 1)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_sampling_does_not_depend_on_batch_composition_or_order(architecture):
    model, decoding = language_model(architecture), GenerationSettings(12)
    together = written(model, decoding)
    alone = [
        written(model, decoding, [request], [seed])[0]
        for request, seed in zip(REQUESTS, SEEDS, strict=True)
    ]
    backwards = written(model, decoding, REQUESTS[::-1], SEEDS[::-1])[::-1]
    small = written(model, decoding, max_batch_tokens=40)
    assert together == alone == backwards == small


def test_a_longer_limit_goes_on_with_the_same_response():
    model = language_model("llama")
    short, long = written(model, GenerationSettings(5)), written(model, GenerationSettings(15))
    assert [response[:5] for response in long] == short


def test_seeds_decide_what_is_written():
    model, decoding = language_model("llama"), GenerationSettings(12)
    requests = [REQUESTS[2]] * 3
    first, same, other = written(model, decoding, requests, [(7, 1), (7, 1), (7, 2)])
    assert first == same
    assert first != other


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_writing_after_a_soft_prompt_of_tokens_equals_writing_after_the_tokens(
    architecture, temperature
):
    model, front = language_model(architecture), (44, 22, 90)
    decoding = GenerationSettings(10, temperature=temperature)
    actual = written(model, decoding, soft_prompt=prompt_vectors(model, front))
    assert actual == written(model, decoding, [front + request for request in REQUESTS])
    assert actual != written(model, decoding)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_responses_end_with_the_first_stop_token_or_at_the_limit(temperature):
    model = language_model("gpt2")
    responses = written(
        model, GenerationSettings(20, temperature=temperature), REQUESTS * 4, [*zip(range(20))]
    )
    assert any(len(response) < 20 for response in responses)
    for response in responses:
        assert len(response) <= 20
        assert not set(response[:-1]) & set(STOP)
        assert len(response) == 20 or response[-1] in STOP


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_co_author_with_the_whole_share_writes_alone(architecture, share):
    student, teacher = language_model(architecture), language_model(architecture, 2, num_layers=3)
    decoding = GenerationSettings(12, temperature=0)
    actual = written(student, decoding, co_generator=CoGenerator(teacher, share))
    assert actual == written(teacher if share else student, decoding)
    assert actual != written(student if share else teacher, decoding)


def test_a_co_author_reads_its_own_requests():
    """Alone in writing, it writes what it would write to them; the student reads its own."""
    student, teacher = language_model("llama"), language_model("llama", 2, num_layers=3)
    decoding = GenerationSettings(12, temperature=0)
    told = tuple((44, 22, 90)[: 1 + i % 3] + request for i, request in enumerate(REQUESTS))
    actual = written(student, decoding, co_generator=CoGenerator(teacher, 1.0, told))
    assert actual == written(teacher, decoding, list(told)) != written(teacher, decoding)
    engine = TransformersEngine(student, STOP)
    written_by_both = engine.generate(
        REQUESTS, SEEDS, GenerationSettings(8), co_generator=CoGenerator(teacher, 0.4, told)
    )
    for own, other, response in zip(REQUESTS, told, written_by_both, strict=True):
        ids = response.token_ids
        for model, request, found in (
            (student, own, response.student_logprobs),
            (teacher, other, response.teacher_logprobs),
        ):
            expected = logprobs_of(model, request, ids)[range(len(ids)), list(ids)]
            torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)


def test_co_authored_tokens_carry_the_logprobs_of_both_models():
    student, teacher = language_model("llama"), language_model("llama", 2, num_layers=3)
    engine = TransformersEngine(student, STOP)
    co_generator = CoGenerator(teacher, 0.4)
    responses = engine.generate(REQUESTS, SEEDS, GenerationSettings(8), co_generator=co_generator)
    for request, response in zip(REQUESTS, responses, strict=True):
        ids = response.token_ids
        for model, own in (
            (student, response.student_logprobs),
            (teacher, response.teacher_logprobs),
        ):
            expected = logprobs_of(model, request, ids)[range(len(ids)), list(ids)]
            torch.testing.assert_close(torch.tensor(own), expected, rtol=1e-4, atol=1e-4)
    assert engine.generate(REQUESTS, SEEDS, GenerationSettings(8))[0].annotations() == {}


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7, "temperature": 1.7}],
    ids=str,
)
def test_sampling_logprobs_are_those_of_the_law_that_tokens_were_drawn_from(settings):
    student, teacher = language_model("llama"), language_model("llama", 2, num_layers=3)
    decoding, co_generator = GenerationSettings(8, **settings), CoGenerator(teacher, 0.4)
    engine = TransformersEngine(student, STOP)
    for request, response in zip(
        REQUESTS, engine.generate(REQUESTS, SEEDS, decoding, co_generator=co_generator), strict=True
    ):
        ids = list(response.token_ids)
        q, p = (
            logprobs_of(model, request, response.token_ids).double().exp()
            for model in (student, teacher)
        )
        weights = (0.6 * q + 0.4 * p) ** (1 / decoding.temperature)
        law = weights / weights.sum(-1, keepdim=True)
        for own in law:
            ranked = sorted(own.tolist(), reverse=True)
            if decoding.top_k:
                own[own < ranked[decoding.top_k - 1]] = 0
            if decoding.top_p < 1:
                before = [sum(ranked[:i]) for i in range(len(ranked))]
                own[own < min(x for x, s in zip(ranked, before, strict=True) if s < 0.7)] = 0
            own /= own.sum()
        expected = law[range(len(ids)), ids].log().float()
        actual = torch.tensor(response.sampling_logprobs)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_a_greedy_token_is_certain():
    student, teacher = language_model("llama"), language_model("llama", 2, num_layers=3)
    decoding, co_generator = GenerationSettings(8, temperature=0), CoGenerator(teacher, 0.4)
    engine = TransformersEngine(student, STOP)
    for response in engine.generate(REQUESTS, SEEDS, decoding, co_generator=co_generator):
        assert set(response.sampling_logprobs) == {0.0}


def chi_square(counts, probabilities):
    """Pearson's statistic over the tokens expected at least 5 times, and its degrees of freedom."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    rest = torch.stack([counts[~common].sum(), expected[~common].sum()])
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    if rest[1] > 0:
        statistic = statistic + (rest[0] - rest[1]) ** 2 / rest[1]
    return statistic.item(), int(common.sum()) - int(rest[1] == 0)


def frequencies(model, decoding, co_generator=None, number=3000):
    requests, seeds = [REQUESTS[2]] * number, [(5, index) for index in range(number)]
    tokens = written(model, decoding, requests, seeds, co_generator=co_generator)
    return torch.bincount(torch.tensor(tokens)[:, 0], minlength=tiny.ROWS).double()


def next_token(model):
    return logprobs_of(model, REQUESTS[2], (2,))[0].double()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_of_sampled_tokens_match_the_distribution(temperature):
    model = language_model("llama")
    probabilities = (next_token(model) / temperature).softmax(-1)
    counts = frequencies(model, GenerationSettings(1, temperature))
    statistic, degrees = chi_square(counts, probabilities)
    assert degrees > 10
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5
    wrong, degrees = chi_square(counts, (next_token(model) / (1.3 * temperature)).softmax(-1))
    assert wrong > degrees + 4 * (2 * degrees) ** 0.5  # the test would notice


def test_frequencies_of_co_authored_tokens_match_the_mixture():
    student, teacher = language_model("llama"), language_model("llama", 2, num_layers=3)
    mixture = 0.3 * next_token(teacher).exp() + 0.7 * next_token(student).exp()
    counts = frequencies(student, GenerationSettings(1), CoGenerator(teacher, 0.3))
    statistic, degrees = chi_square(counts, mixture)
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5
    wrong, degrees = chi_square(counts, next_token(student).exp())
    assert wrong > degrees + 4 * (2 * degrees) ** 0.5


def test_top_k_and_top_p_keep_the_most_probable_tokens_only():
    model = language_model("llama")
    probabilities, order = next_token(model).exp().sort(descending=True)
    by_k = frequencies(model, GenerationSettings(1, top_k=4), number=1000)
    assert set(by_k.nonzero()[:, 0].tolist()) == set(order[:4].tolist())
    nucleus = int((probabilities.cumsum(0) < 0.5).sum()) + 1
    by_p = frequencies(model, GenerationSettings(1, top_p=0.5), number=1000)
    assert set(by_p.nonzero()[:, 0].tolist()) == set(order[:nucleus].tolist())


def test_mixed_precision_writes_with_the_current_weights():
    module = tiny.model("llama", seed=1)
    engine = TransformersEngine(tiny.language_model(module, tiny.ROWS, torch.bfloat16), STOP)
    decoding = GenerationSettings(6, temperature=0)
    before = engine.generate(REQUESTS, SEEDS, decoding)
    module.load_state_dict(tiny.model("llama", seed=9).state_dict())
    after = engine.generate(REQUESTS, SEEDS, decoding)
    fresh = TransformersEngine(
        tiny.language_model(tiny.model("llama", seed=9), tiny.ROWS, torch.bfloat16), STOP
    )
    assert after == fresh.generate(REQUESTS, SEEDS, decoding)
    assert after != before
    assert next(module.parameters()).dtype == torch.float32
    assert sum(weight.numel() for weight in engine._working_copy.module.parameters()) == 0


def test_speed_is_measured_with_every_engine_there_on_responses_that_nothing_ends(tmp_path):
    model = language_model("llama")
    model.module.save_pretrained(tmp_path)
    lengths: list[int] = []

    class StandIn(TransformersEngine):
        def generate(self, *arguments, **options):
            responses = super().generate(*arguments, **options)
            lengths.extend(len(response.token_ids) for response in responses)
            return responses

    asked = StandIn(model, range(tiny.ROWS))
    decoding = GenerationSettings(6)
    found = size_and_speed(str(tmp_path), model, REQUESTS, decoding, {"vllm": asked})
    assert found["vllm_tokens_per_second"] > 0
    assert found["tokens_per_second"] > 0
    assert found["engine"] == "transformers"
    assert lengths == [6] * len(REQUESTS) * REPEATS
    assert len(asked.stop_ids) == tiny.ROWS
    alone = size_and_speed(str(tmp_path), model, REQUESTS, decoding, {"transformers": asked})
    assert "vllm_tokens_per_second" not in alone
