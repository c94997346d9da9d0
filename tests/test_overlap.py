"""Requests that training and held-out data share, and splits that keep them apart."""

import random
import time

import pytest

from promptkd.data import Example, content_digest, overlap, split_by_digest
from promptkd.errors import UserError


def sentences(number, seed):
    """Texts out of few words, some of them changed a little."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefgh", k=5)) for _ in range(40)]
    texts = [" ".join(chance.choices(words, k=chance.randint(1, 30))) for _ in range(number)]
    return [Example(text) for text in texts + [text[:-2] + "zz" for text in texts[: number // 3]]]


def shingles(text):
    text = " ".join(text.split())
    return {text[i : i + 5] for i in range(len(text) - 4)}


def test_the_overlap_is_that_of_comparing_all_pairs():
    train, held_out = sentences(60, 1), sentences(30, 2) + sentences(60, 1)[10:70:5]
    train += [Example(" ".join(held_out[3].instruction.split()) + "  ")]
    sets = {e.instruction: shingles(e.instruction) for e in train + held_out}
    close, same = set(), set()
    for i, asked in enumerate(held_out):
        for known in train:
            own, other = sets[asked.instruction], sets[known.instruction]
            if asked.instruction.split() == known.instruction.split():
                same.add(i)
            elif len(own & other) / len(own | other) >= 0.8:
                close.add(i)
    found = overlap(train, held_out)
    assert set(found.exact) == same
    assert set(found.near) == close - same
    assert found.near
    assert f"of {len(held_out)} held-out requests {len(same)} are in and" in str(found.sentence())


def test_white_space_and_the_form_of_a_request_make_no_difference_to_what_is_equal():
    train = [Example("Add  them.\n", "2 and 3")]
    assert overlap(train, [Example("Add them.", "2  and 3")]).exact == (0,)
    assert overlap(train, [Example("Add them.", "4 and 5, please, if you can")]).sentence() is None


def test_ten_thousand_rows_are_compared_in_seconds():
    train, held_out = sentences(7_500, 3), sentences(375, 4)
    start = time.process_time()
    overlap(train, held_out)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("held_out", [0.2, 30])
def test_a_split_keeps_equal_requests_on_one_side_and_rows_in_order(held_out):
    examples = sentences(120, 5) + sentences(120, 5)[:50]
    train, rest = split_by_digest(examples, held_out)
    assert overlap(train, rest).exact == ()
    assert sorted(map(id, train + rest)) == sorted(map(id, examples))
    assert [e for e in examples if any(e is t for t in train)] == train
    expected = held_out if held_out >= 1 else held_out * len(examples)
    assert abs(len(rest) - expected) <= 15


def test_rows_that_are_added_do_not_move_the_others_of_a_share():
    examples = sentences(120, 6)
    _, before = split_by_digest(examples, 0.2)
    _, after = split_by_digest(sentences(50, 7) + examples, 0.2)
    assert [e for e in after if any(e is own for own in examples)] == before


def test_a_split_that_leaves_one_side_empty_is_refused():
    with pytest.raises(UserError, match="leaves 0 for training and 2 held out"):
        split_by_digest([Example("a"), Example("b")], 2)


def test_the_digest_of_data_is_that_of_all_that_can_be_learnt_in_its_order():
    rows = [Example("a", "b", ("c",)), Example("d", messages=({"role": "user", "content": "d"},))]
    assert content_digest(rows) == content_digest(list(rows))
    others = [rows[::-1], rows[:1], [Example("a", "b", ("x",)), rows[1]], [rows[0], Example("d")]]
    assert len({content_digest(other) for other in [rows, *others]}) == 5
