"""What the judge is asked, how its replies are read, and what they add up to."""

import json
import random
import subprocess
import sys
from typing import Any

import pytest
import yaml

import tiny
from judge_server import (
    Answer,
    Asked,
    JudgeServer,
    ask,
    fair_grades,
    fair_preference,
    says,
    shown_grades,
    write_predictions,
)
from promptkd.errors import UserError
from promptkd.judge.judge import judge
from promptkd.judge.protocols import read_grades, read_preference, summarise_grades


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_the_score_is_the_models_grades_over_the_references_grades_averaged_over_seeds(tmp_path):
    run = write_predictions(tmp_path, {10: [2, 4, 9], 20: [6, 6, 6]}, [5, 10, 5])
    with JudgeServer(fair_grades) as server:
        result = ask(run, server)
    scores = result["scores"]
    assert scores["score"]["by_seed"] == [100 * 15 / 20, 100 * 18 / 20]
    assert scores["score"]["mean"] == pytest.approx(82.5)
    assert scores["score"]["deviation_over_seeds"] == pytest.approx(15 / 2**0.5)
    assert scores["model_grade"]["mean"] == pytest.approx(33 / 6)
    assert scores["reference_grade"]["mean"] == pytest.approx(40 / 6)
    assert result["counts"] == {
        "pairs": 6,
        "judged": 6,
        "asked": 6,
        "cached": 0,
        "malformed": 0,
        "failed": 0,
    }
    assert json.loads((run / "judge" / "test.json").read_text()) == result
    assert result["judge"]["host"] == server.base_url.removeprefix("http://").removesuffix("/v1")


def test_the_model_is_shown_first_with_the_papers_temperature(tmp_path):
    run = write_predictions(tmp_path, {10: [3]}, [8])
    with JudgeServer(fair_grades) as server:
        result = ask(run, server)
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.body["temperature"] == 0.7
    assert asked.body["model"] == "grader"
    assert asked.text == result["instruction"].format(
        request="request 0", first="worth 3", second="worth 8"
    )


def test_the_scores_interval_agrees_with_a_bootstrap_in_plain_loops():
    source = random.Random(1)
    verdicts: dict[Any, Any] = {
        ((seed, index), "model first"): (source.randint(1, 10), source.randint(3, 10))
        for seed in (10, 20)
        for index in range(30)
    }
    verdicts[(10, 4), "model first"] = None
    _, scores = summarise_grades(verdicts)
    assert scores is not None
    means = []
    for _ in range(3000):
        rows = [source.randrange(30) for _ in range(30)]
        ratios = []
        for seed in (10, 20):
            known = [v for i in rows if (v := verdicts[(seed, i), "model first"])]
            ratios.append(100 * sum(v[0] for v in known) / sum(v[1] for v in known))
        means.append(sum(ratios) / 2)
    means.sort()
    assert scores["score"]["interval_95"] == pytest.approx([means[75], means[2924]], abs=1.5)


def test_a_win_counts_only_if_both_orders_agree(tmp_path):
    run = write_predictions(tmp_path, {10: [9, 2, 5, 7]}, [5, 5, 5, 5])

    def answer(asked: Asked) -> Answer:
        return says("first") if "request 3" in asked.text else fair_preference(asked)

    with JudgeServer(answer) as server:
        result = ask(run, server, protocol="pairwise")
    shares = {name: score["mean"] for name, score in result["scores"].items()}
    assert shares == {
        "win_rate": 50.0,
        "win": 25.0,
        "tie": 50.0,
        "loss": 25.0,
        "orders_agree": 75.0,
        "first_shown_preferred": pytest.approx(100 * 4 / 6),
    }
    assert len(server.asked) == 7  # the two orders of equal replies are one question
    assert (run / "judge" / "test.against-references.json").is_file()


def test_a_judge_that_always_prefers_the_first_shown_gives_ties_alone(tmp_path):
    run = write_predictions(tmp_path, {10: [9, 1], 20: [8, 1]}, [5, 5])
    with JudgeServer(lambda asked: says("First.")) as server:
        scores = ask(run, server, protocol="pairwise")["scores"]
    assert scores["win_rate"]["mean"] == 50.0
    assert scores["win_rate"]["interval_95"] == [50.0, 50.0]
    assert scores["tie"]["mean"] == 100.0
    assert scores["orders_agree"]["mean"] == 0.0
    assert scores["first_shown_preferred"]["mean"] == 100.0


def test_a_run_is_compared_with_another_run_on_the_same_request_and_seed(tmp_path):
    ours = write_predictions(tmp_path / "ours", {10: [9, 1], 20: [9, 9]}, [5, 5])
    theirs = write_predictions(tmp_path / "theirs", {10: [2, 2], 20: [1, 1]}, [5, 5])
    with JudgeServer(fair_preference) as server:
        result = ask(ours, server, protocol="pairwise", against=theirs)
    assert result["scores"]["win_rate"]["by_seed"] == [50.0, 100.0]
    assert json.loads((ours / "judge" / "test.against-theirs.json").read_text()) == result


def test_runs_that_were_evaluated_differently_are_not_compared(tmp_path):
    ours = write_predictions(tmp_path / "ours", {10: [9, 1]}, [5, 5])
    theirs = write_predictions(tmp_path / "theirs", {10: [2, 2], 20: [1, 1]}, [5, 5])
    other = write_predictions(tmp_path / "other", {10: [2, 2]}, [7, 7])
    with JudgeServer(fair_preference) as server:
        with pytest.raises(UserError, match="2 and 4 responses, 2 of the same"):
            ask(ours, server, protocol="pairwise", against=theirs)
        with pytest.raises(UserError, match="different requests"):
            ask(ours, server, protocol="pairwise", against=other)
        ask(ours, server, protocol="pairwise", against=theirs, seeds=[10])


@pytest.mark.parametrize(
    ("reply", "grades"),
    [
        ("8 6", (8.0, 6.0)),
        ("\n  **7.5, 10**\nThe first ...", (7.5, 10.0)),
        ("<think>\n1 1\n</think>\n\n3 4", (3.0, 4.0)),
        ("8", None),
        ("8 6 4", None),
        ("0 5", None),
        ("11 5", None),
        ("-3 5", None),
        ("Assistant 1: 8", None),
        ("I would give\n8 6", None),
        ("", None),
    ],
)
def test_grades_are_two_numbers_from_1_to_10_alone_on_the_first_line(reply, grades):
    assert read_grades(reply) == grades


@pytest.mark.parametrize(
    ("reply", "preference"),
    [
        ("first", "first"),
        ("**Second.**\nBecause", "second"),
        ('"tie"', "tie"),
        ("<think>first</think>tie", "tie"),
        ("The first reply", None),
        ("assistant 1", None),
        ("", None),
    ],
)
def test_a_preference_is_one_word_alone_on_the_first_line(reply, preference):
    assert read_preference(reply) == preference


def test_the_same_call_again_asks_nothing_and_says_the_same(tmp_path):
    run = write_predictions(tmp_path, {10: [2, 4, 9]}, [5, 10, 5])
    with JudgeServer(fair_grades) as server:
        first = ask(run, server)
    again = ask(run, server)  # the server is gone
    assert again["counts"] | {"asked": 3, "cached": 0} == first["counts"]
    assert again["counts"]["cached"] == 3
    assert again["scores"] == first["scores"]


def test_another_temperature_is_another_question(tmp_path):
    run = write_predictions(tmp_path, {10: [2]}, [5])
    with JudgeServer(fair_grades) as server:
        ask(run, server)
        ask(run, server, temperature=0.0)
    assert [asked.body["temperature"] for asked in server.asked] == [0.7, 0.0]


def test_a_malformed_reply_is_asked_again_with_another_seed_counted_and_shown(tmp_path):
    run = write_predictions(tmp_path, {10: [2, 4]}, [4, 4])

    def answer(asked: Asked) -> Answer:
        nonsense = "request 1" in asked.text and asked.body["seed"] < 2
        return says("Both are nice \ud83d") if nonsense else fair_grades(asked)

    with JudgeServer(answer) as server:
        result = ask(run, server)
    counts = result["counts"]
    assert (counts["judged"], counts["asked"], counts["malformed"]) == (2, 4, 2)
    shown = {"seed": 10, "index": 1, "order": "model first", "reply": "Both are nice ?"}
    assert result["malformed_examples"] == [shown, shown]
    lines = (run / "judge" / "test.replies.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[1]["replies"] == ["Both are nice ?"] * 2 + ["4 4\nAs they say."]
    assert rows[1]["verdict"] == [4.0, 4.0]


def test_a_judge_that_never_answers_in_form_gives_counts_and_no_score(tmp_path):
    run = write_predictions(tmp_path, {10: [2, 4]}, [4, 4])
    with JudgeServer(lambda asked: says(None)) as server:
        result = ask(run, server, max_reasks=1)
        again = ask(run, server, max_reasks=1)
    assert result["scores"] is None
    assert result["counts"]["judged"] == 0
    assert result["counts"]["malformed"] == 4
    assert again["counts"]["cached"] == 4


def test_a_pair_with_one_unreadable_order_is_left_out(tmp_path):
    run = write_predictions(tmp_path, {10: [9, 9]}, [4, 4])

    def answer(asked: Asked) -> Answer:
        unreadable = "request 0" in asked.text and shown_grades(asked) == (4, 9)
        return says("hm") if unreadable else fair_preference(asked)

    with JudgeServer(answer) as server:
        result = ask(run, server, protocol="pairwise", max_reasks=0)
    assert (result["counts"]["pairs"], result["counts"]["judged"]) == (2, 1)
    assert result["scores"]["win"]["mean"] == 100.0


def test_equal_responses_of_two_seeds_are_asked_about_once(tmp_path):
    run = write_predictions(tmp_path, {10: [2, 3], 20: [2, 4]}, [5, 5])
    with JudgeServer(fair_grades) as server:
        result = ask(run, server)
    assert len(server.asked) == 3
    assert result["counts"]["judged"] == 4


def test_seeds_and_num_examples_choose_what_is_judged(tmp_path):
    run = write_predictions(tmp_path, {10: [2, 3, 4], 20: [5, 6, 7]}, [5, 5, 5])
    with JudgeServer(fair_grades) as server:
        result = ask(run, server, seeds=[20], num_examples=2)
        assert sorted(shown_grades(asked)[0] for asked in server.asked) == [5, 6]
        assert (result["seeds"], result["num_examples"]) == ([20], 2)
        with pytest.raises(UserError, match=r"no responses of the seeds \[30\]"):
            ask(run, server, seeds=[20, 30])


def test_a_line_separator_inside_a_response_is_no_new_line(tmp_path):
    run = write_predictions(tmp_path, {10: [2]}, [5])
    path = run / "evaluation" / "test.predictions.jsonl"
    row = json.loads(path.read_text()) | {"response": "worth\u2028\x85 worth 3"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    with JudgeServer(fair_grades) as server:
        assert ask(run, server)["scores"]["score"]["mean"] == 60.0


def test_responses_that_a_run_lacks_are_written_first(tmp_path):
    student, _ = tiny.save_pair(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    student.rename(run / "student")
    (run / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(tmp_path)))
    data = tiny.write_data(tmp_path / "test.jsonl", num_rows=3)
    with JudgeServer(lambda asked: says("3 6")) as server:
        result = judge(run, str(data), base_url=server.base_url, model="grader", seeds=[10])
    assert (run / "evaluation" / "test.predictions.jsonl").is_file()
    assert result["counts"]["judged"] == 3
    assert result["scores"]["score"]["mean"] == 50.0


def test_what_the_user_can_mend_is_said_in_a_sentence(tmp_path, monkeypatch):
    run = write_predictions(tmp_path / "run", {10: [2]}, [4])
    with JudgeServer(fair_grades) as server:
        with pytest.raises(UserError, match="'elo'; known: score, pairwise"):
            ask(run, server, protocol="elo")
        with pytest.raises(UserError, match="'score' compares with the references only"):
            ask(run, server, against=run)
        with pytest.raises(UserError, match="is no run's directory"):
            ask(tmp_path / "nothing", server)
        with pytest.raises(UserError, match=r"'localhost:8000', not an http address"):
            judge(run, "test.jsonl", base_url="localhost:8000", model="grader")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-\u2013")
        with pytest.raises(UserError, match="OPENAI_API_KEY holds characters"):
            ask(run, server)
        monkeypatch.delenv("OPENAI_API_KEY")
        (run / "judge").mkdir()
        (run / "judge" / "replies.sqlite").write_text("no database " * 100)
        with pytest.raises(UserError, match="remove that file if it is damaged"):
            ask(run, server)
        path = run / "evaluation" / "test.predictions.jsonl"
        row = json.loads(path.read_text()) | {"references": []}
        path.write_text(json.dumps(row))
        with pytest.raises(UserError, match=r"1 requests of test.jsonl have no reference"):
            ask(run, server)
        path.write_text("{broken")
        with pytest.raises(UserError, match=r"predictions.jsonl:1: not a prediction"):
            ask(run, server)
    assert server.asked == []


def test_judging_imports_no_torch():
    program = "import sys, promptkd.judge.judge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
