"""Who writes, what is remembered, and how rollouts are cut into micro-batches."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from promptkd.data import Batch, EncodedExample
from promptkd.errors import UserError
from promptkd.methods import build_method
from promptkd.micro_batches import pad, split_by_length
from promptkd.models.language_model import PADDING
from promptkd.replay import AdaptiveReplay, Repeated, from_json, to_json
from promptkd.rollouts import (
    Corpus,
    Generators,
    Mixture,
    OfflineTeacher,
    Reference,
    Rollout,
    Student,
    TeacherMixed,
    length_normalized_returns,
)

CPU = torch.device("cpu")
EXAMPLES = tuple(
    EncodedExample(index, (100 + index,), (200 + index, 0), (f"answer {index}",))
    for index in range(40)
)


def batch(start=0, size=4, rank=0, num_ranks=1):
    chosen = [EXAMPLES[i % len(EXAMPLES)] for i in range(start, start + size)]
    return Batch(tuple(chosen[rank::num_ranks]))


def generators(step=0, max_steps=100, seed=0):
    """The author and the step can be read off what each of these writes."""

    def by(author):
        def write(examples):
            return [
                Rollout(e.index, e.request_ids, (1000 + step, e.index), author) for e in examples
            ]

        return write

    def mixed(examples, share):
        rollouts = []
        for e in examples:
            q, p = (-1.0 - e.index, -0.5, -2.0), (-0.5, -1.5 - step, -1.0)
            drawn = tuple(
                math.log((1 - share) * math.exp(a) + share * math.exp(b))
                for a, b in zip(q, p, strict=True)
            )
            notes = {"student_logprobs": q, "teacher_logprobs": p, "sampling_logprobs": drawn}
            rollouts.append(Rollout(e.index, e.request_ids, (1, 2, 3), "mixed", notes))
        return rollouts

    def encode(text):
        return tuple(map(ord, text))

    return Generators(by("student"), by("teacher"), mixed, step / max_steps, seed, step, encode)


def authors(rollouts):
    return [rollout.author for rollout in rollouts]


# -- sources without memory


def test_the_data_the_student_and_the_teacher_answer_every_request_in_order():
    for source, author in (
        (Reference(), "reference"),
        (Student(), "student"),
        (OfflineTeacher(), "teacher"),
    ):
        rollouts = source.generate(batch(), generators(), {})
        assert [(r.index, r.author) for r in rollouts] == [(i, author) for i in range(4)]
    assert Reference().generate(batch(), generators(), {})[2].response_ids == (202, 0)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mixture_lets_the_student_write_its_share(share):
    written = [
        rollout
        for step in range(100)
        for rollout in Mixture(share).generate(batch(4 * step), generators(step), {})
    ]
    measured = authors(written).count("student") / len(written)
    assert measured == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / 400) + 1e-9)


def test_a_mixture_answers_each_request_once_and_draws_per_request():
    written = Mixture(0.5).generate(batch(0, 40), generators(), {})
    assert sorted(rollout.index for rollout in written) == list(range(40))
    assert 0 < authors(written).count("student") < 40


def test_the_mixtures_share_grows_linearly_and_reaches_its_end():
    mixture = Mixture(0.2, 1.0)
    assert [mixture.share(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.2, 0.4, 0.6, 1.0])


def test_imitation_starts_with_the_data_and_ends_with_the_student():
    growing = Mixture(0.0, 1.0)
    first = growing.generate(batch(0, 40), generators(0, 10), {})
    late = growing.generate(batch(0, 40), generators(9, 10), {})
    assert authors(first).count("student") == 0
    assert authors(late).count("student") >= 30


@pytest.mark.parametrize("source", [Mixture(0.5), AdaptiveReplay(0.5, capacity=2)])
def test_two_ranks_together_write_what_one_does(source):
    """Whole and shared, over several steps; replay must draw alike on every rank."""
    states = [{}, {}, {}]
    kept = 0
    for step in range(30):
        whole = source.generate(batch(8 * step, 8), generators(step), states[0])
        shared = [
            rollout
            for rank in (0, 1)
            for rollout in source.generate(
                batch(8 * step, 8, rank, 2), generators(step), states[1 + rank]
            )
        ]
        assert sorted(map(repr, shared)) == sorted(map(repr, whole))
        kept += any(r.author == "student" and r.response_ids[0] != 1000 + step for r in whole)
    assert kept > 0 or isinstance(source, Mixture)


def test_advantages_are_the_mean_log_ratio_of_what_follows():
    (rollout,) = TeacherMixed(0.2).generate(batch(size=1), generators(), {})
    assert rollout.annotations["advantages"] == pytest.approx((0.0, 1.0, 0.0))


def test_returns_equal_a_double_loop():
    generator = random.Random(0)
    for length in (1, 2, 5, 13):
        rewards = [generator.gauss(0, 3) for _ in range(length)]
        expected = []
        for t in range(length):
            later = [rewards[u] for u in range(length) if u > t]
            expected.append(sum(later) / len(later) if later else 0.0)
        assert length_normalized_returns(rewards) == pytest.approx(tuple(expected))


def test_a_passage_of_the_corpus_is_its_first_token_and_the_rest(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("one two\n\nx\n  three four  \n")
    source, found = Corpus(str(path), max_tokens=6), set()
    for step in range(20):
        for rollout in source.generate(batch(), generators(step), {}):
            assert len(rollout.request_ids) == 1
            found.add("".join(map(chr, rollout.request_ids + rollout.response_ids)))
    assert found == {"one tw", "three "}


def test_a_corpus_without_passages_is_refused(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\nx\n")
    with pytest.raises(UserError, match="no line of two words"):
        Corpus(str(path))


def test_a_corpus_that_is_no_utf_8_is_refused_before_any_step(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes("caf\xe9 au lait\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"corpus\.txt is not UTF-8 text .*Convert it"):
        build_method("minillm", corpus=str(path))


# -- sources with memory


def test_a_rollout_survives_json():
    notes = {"sampling_logprobs": (-0.1, -1 / 3), "advantages": (1e-17, 2.0)}
    rollout = Rollout(7, (1, 2), (3, 0), "mixed", notes)
    assert from_json(json.loads(json.dumps(to_json(rollout)))) == rollout


def test_repeated_rollouts_serve_their_steps_and_are_then_written_anew():
    source, state = Repeated(Student(), 3), {}
    written = [source.generate(batch(4 * step), generators(step), state) for step in range(7)]
    steps = [rollouts[0].response_ids[0] - 1000 for rollouts in written]
    assert steps == [0, 0, 0, 3, 3, 3, 6]
    assert [rollouts[0].index for rollouts in written] == [0, 0, 0, 12, 12, 12, 24]


def test_repeated_rollouts_keep_their_annotations():
    source, state = Repeated(TeacherMixed(0.2), 2), {}
    first, second = (source.generate(batch(), generators(step), state) for step in range(2))
    assert first == second
    assert first == TeacherMixed(0.2).generate(batch(), generators(0), {})


def test_what_is_used_up_is_not_kept_for_checkpoints():
    source, state = Repeated(Student(), 2), {}
    source.generate(batch(), generators(0), state)
    assert "rollouts" in state
    source.generate(batch(), generators(1), state)
    assert "rollouts" not in state


@pytest.mark.parametrize(
    "source", [Repeated(TeacherMixed(), 3), AdaptiveReplay(0.9, capacity=2)], ids=lambda s: repr(s)
)
def test_a_state_that_went_through_json_writes_the_same(source):
    straight, saved = {}, {}
    for step in range(20):
        if step % 3 == 1:
            for state in (straight, saved):
                source.observe(step / 10, state)
        expected = source.generate(batch(4 * step), generators(step), straight)
        saved = json.loads(json.dumps(saved))
        assert source.generate(batch(4 * step), generators(step), saved) == expected
    assert json.loads(json.dumps(straight)) == json.loads(json.dumps(saved))


def test_the_adaptive_share_follows_a_hand_made_trace():
    """0.1 more whenever the loss is at least 0.1 above the last loss that moved it."""
    source, state, shares = AdaptiveReplay(), {}, []
    for loss in (2.0, 2.05, 1.5, 2.1, 2.15, 2.25, 2.0, 2.35, 9.0):
        source.observe(loss, state)
        shares.append(state.get("student_share", 0.0))
    # reference   2.0  2.0  2.0  2.1  2.1  2.25 2.25 2.35 9.0
    assert shares == pytest.approx([0.0, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.4])


def test_the_adaptive_share_never_passes_one():
    source, state = AdaptiveReplay(0.95), {}
    for loss in (1.0, 2.0, 3.0):
        source.observe(loss, state)
    assert state["student_share"] == 1.0


def test_adaptive_replay_decides_as_the_three_rules_say():
    """Against the rules, read line by line, with the coin that every rank sees."""
    source, state = AdaptiveReplay(0.6, capacity=3), {}
    num_kept, seen = 0, set()
    for step in range(100):
        r = random.Random(f"replay 0 {step} 0").random()
        phi, full, progress = 0.6, num_kept == 3, step / 100
        if r < phi * (1 - progress) or (r < phi and not full):
            expected = "fresh"
        elif r < phi:
            expected = "kept"
        else:
            expected = "data"
        rollouts = source.generate(batch(4 * step), generators(step), state)
        if authors(rollouts) == ["reference"] * 4:
            decided = "data"
        else:
            assert authors(rollouts) == ["student"] * 4
            decided = "fresh" if rollouts[0].response_ids[0] == 1000 + step else "kept"
        assert decided == expected, step
        num_kept = min(3, num_kept + (decided == "fresh"))
        seen.add(decided)
    assert seen == {"fresh", "kept", "data"}


def test_the_buffer_holds_the_newest_steps_and_no_more():
    source, state, fresh = AdaptiveReplay(1.0, capacity=5), {}, []
    for step in range(60):
        rollouts = source.generate(batch(4 * step), generators(step, 60), state)
        if rollouts[0].response_ids[0] == 1000 + step:
            fresh.append(1000 + step)
        kept = [from_json(items[0]).response_ids[0] for items in state["kept"]]
        assert kept == fresh[-5:]


def test_replay_draws_from_the_whole_buffer():
    source, state, drawn = AdaptiveReplay(1.0, capacity=4), {}, set()
    for step in range(4):
        source.generate(batch(), generators(step), state)
    for step in range(1000, 1100):  # at the end of training nothing is written any more
        for rollout in source.generate(batch(), generators(step, step), state):
            drawn.add(rollout.response_ids)
    assert drawn == {(1000 + step, index) for step in range(4) for index in range(4)}


def test_the_fresh_share_falls_to_nothing_at_the_end():
    source, state = AdaptiveReplay(1.0, capacity=1), {}
    fresh = [
        source.generate(batch(), generators(step, 400), state)[0].response_ids[0] == 1000 + step
        for step in range(400)
    ]
    assert sum(fresh[:100]) > 75 > 25 > sum(fresh[-100:])


# -- micro-batches


def rollouts_of(lengths):
    return [
        Rollout(
            index,
            tuple(range(1, 1 + request)),
            tuple(range(50, 50 + response)),
            "reference",
            {"advantages": tuple(float(index + t) for t in range(response))},
        )
        for index, (request, response) in enumerate(lengths)
    ]


LENGTHS = [(3, 5), (1, 1), (9, 4), (2, 2), (6, 6), (3, 1), (7, 13), (2, 9), (1, 30), (4, 4)]


@pytest.mark.parametrize("budget", [1, 16, 40, 64, 10_000])
def test_no_micro_batch_exceeds_the_budget_unless_one_rollout_does(budget):
    for piece in split_by_length(rollouts_of(LENGTHS), budget, CPU):
        assert piece.tokens.numel() <= budget or len(piece.rollouts) == 1


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_splitting_loses_and_doubles_nothing(budget):
    rollouts = rollouts_of(LENGTHS)
    pieces = split_by_length(rollouts, budget, CPU)
    found = [rollout for piece in pieces for rollout in piece.rollouts]
    assert sorted(found, key=lambda r: r.index) == rollouts
    assert sum(piece.response_mask.sum().item() for piece in pieces) == sum(n for _, n in LENGTHS)


def test_micro_batches_go_from_long_to_short():
    pieces = split_by_length(rollouts_of(LENGTHS), 40, CPU)
    lengths = [rollout.num_tokens for piece in pieces for rollout in piece.rollouts]
    assert lengths == sorted(lengths, reverse=True)


def test_rollouts_of_one_length_share_a_micro_batch_when_the_budget_allows():
    assert len(split_by_length(rollouts_of([(9, 100)] * 10), 1090, CPU)) == 1
    assert len(split_by_length(rollouts_of([(9, 100)] * 10), 1089, CPU)) == 2


def test_nothing_written_is_no_micro_batch():
    assert split_by_length([], 100, CPU) == []


def test_packed_rollouts_are_cut_by_their_real_tokens():
    rollouts = rollouts_of([(50, 150), (50, 100), *[(10, 40)] * 10])  # 850 tokens
    assert len(split_by_length(rollouts, 1024, CPU)) == 2
    (whole,) = split_by_length(rollouts, 850, CPU, packed=True)
    assert whole.num_tokens == 850
    pieces = split_by_length(rollouts, 300, CPU, packed=True)
    assert [piece.num_tokens for piece in pieces] == [200, 300, 300, 50]


def test_padding_puts_requests_and_responses_where_the_mask_says():
    piece = pad(rollouts_of([(2, 3), (1, 1)]), CPU, 6)
    assert piece.tokens.tolist() == [[1, 2, 50, 51, 52, PADDING], [1, 50, *4 * [PADDING]]]
    assert piece.response_mask.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]]
    assert piece.response_ids.tolist() == [50, 51, 52, 50]
    assert piece.num_tokens == 7


def test_annotations_stay_with_their_tokens():
    piece = pad(rollouts_of([(2, 3), (1, 1), (1, 2)]), CPU)
    assert piece.annotation("advantages").tolist() == [0.0, 1.0, 2.0, 1.0, 2.0, 3.0]


SOURCES = {
    "data": Reference(),
    "student": Student(),
    "teacher": OfflineTeacher(),
    "mixture": Mixture(0.1),
    "repeated": Repeated(Mixture(0.1), 3),
    "replay": AdaptiveReplay(0.6, capacity=3),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_says_beforehand_whether_the_student_will_write(name):
    source, state, answers, plain = SOURCES[name], {}, set(), generators()
    asked = []

    def student(examples):
        asked.append(examples)
        return plain.student(examples)

    for step in range(40):
        asked.clear()
        given = replace(generators(step, max_steps=40), student=student)
        said = source.asks_student(batch(4 * step), given, state)
        source.generate(batch(4 * step), given, state)
        assert said == bool(asked), step
        answers.add(said)
    expected = {"data": {False}, "teacher": {False}, "student": {True}}
    assert answers == expected.get(name, {False, True})
