"""What a response scores, and by which score training keeps a student."""

import json

import pytest
import torch

import runs
import tiny
from promptkd.data import Encoder, Example, evaluation_set
from promptkd.errors import UserError
from promptkd.evaluation.results import Prediction, summarise
from promptkd.evaluation.scorer import predict, score
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.models.language_model import LanguageModel
from promptkd.rollouts import Rollout
from promptkd.token_losses import cross_entropies, distances


def test_predictions_do_not_depend_on_the_batch():
    encoder = Encoder(tiny.tokenizer(), "none", 24, 10)
    examples = [Example("say " + "?" * (i % 6), responses=("it",)) for i in range(9)]
    data = evaluation_set(examples, encoder)
    engine = TransformersEngine(LanguageModel(tiny.model("gpt2"), tiny.ROWS), (tiny.EOS,))
    whole = predict(engine, data, GenerationSettings(10), seed=5)

    seeds = [(5, example.index) for example in data.examples]
    requests = [example.request_ids for example in data.examples]
    one_by_one = engine.generate(requests, seeds, GenerationSettings(10), max_batch_tokens=1)
    assert [rollout.response_ids for rollout in whole] == [r.token_ids for r in one_by_one]


def test_an_empty_response_scores_zero_and_has_one_token():
    encoder = Encoder(tiny.tokenizer(), "none", 24, 10)
    data = evaluation_set([Example("say", responses=("it is",))], encoder)
    silent = [Rollout(0, data.examples[0].request_ids, (tiny.EOS,), "student")]
    (prediction,) = score(silent, data, encoder.tokenizer, (tiny.EOS,), seed=0)

    assert (prediction.response, prediction.num_tokens, prediction.ended) == ("", 1, True)
    assert prediction.scores == {"rouge_l": 0, "exact_match": 0}
    scores = summarise([prediction])
    assert scores["ended"].mean == 100
    assert scores["rouge_l"].to_dict() == {
        "mean": 0,
        "num_requests": 1,
        "deviation_over_seeds": 0,
        "interval_95": [0, 0],
        "by_seed": [0],
    }


def test_where_some_requests_have_no_reference_the_others_are_scored():
    def prediction(index, score):
        references = () if score is None else ("r",)
        return Prediction(
            index=index,
            seed=1,
            request="q",
            response="a",
            references=references,
            num_tokens=2,
            ended=True,
            scores={} if score is None else {"rouge_l": score},
        )

    scores = summarise([prediction(0, 10.0), prediction(1, None), prediction(2, 30.0)])
    assert (scores["rouge_l"].mean, scores["rouge_l"].num_requests) == (20.0, 2)
    assert scores["ended"].num_requests == 3


def test_token_losses_are_those_of_every_response_token():
    student = LanguageModel(tiny.model("llama", seed=1), tiny.ROWS)
    teacher = LanguageModel(tiny.model("llama", seed=2), tiny.ROWS)
    written = [Rollout(0, (5, 6, 7), (8, 9, 0), "student"), Rollout(1, (5,), (11, 0), "student")]
    cross_entropy, reverse_kl = 0.0, 0.0
    with torch.no_grad():
        for rollout in written:
            ids = torch.tensor([rollout.request_ids + rollout.response_ids])
            own, other = (m.module(ids).logits[0].log_softmax(-1) for m in (student, teacher))
            for position in range(len(rollout.request_ids), rollout.num_tokens):
                q, p = own[position - 1], other[position - 1]
                cross_entropy -= q[ids[0, position]].item()
                reverse_kl += (q.exp() * (q - p)).sum().item()

    for budget in (1, 1000):
        own = torch.cat(cross_entropies(written, student, budget))
        apart = torch.cat(distances(written, student, teacher, budget))
        assert len(own) == len(apart) == 5
        assert own.sum().item() == pytest.approx(cross_entropy, rel=1e-5)
        assert apart.sum().item() == pytest.approx(reverse_kl, rel=1e-5)


def test_the_student_is_chosen_by_a_users_own_function(tmp_path, monkeypatch):
    tiny.save_pair(tmp_path)
    (tmp_path / "chosen.py").write_text(
        "def length(response, references, example):\n    return len(response)\n"
    )
    monkeypatch.chdir(tmp_path)
    raw = tiny.recipe(
        tmp_path,
        data={"validation": str(tiny.write_data(tmp_path / "train.jsonl"))},
        optimization={"max_steps": 2},
        evaluation={"every_steps": 1, "num_examples": 3, "metric": "chosen:length"},
    )
    best = json.loads((runs.train(raw) / "summary.json").read_text())["best"]
    assert best["value"] == best["scores"]["chosen:length"]


def test_training_on_chinese_refuses_rouge_l_and_takes_its_unicode_form(tmp_path):
    tiny.save_pair(tmp_path)
    rows = [{"instruction": f"say {i}", "output": "你好世界"} for i in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(text)
    raw = tiny.recipe(
        tmp_path,
        data={"validation": str(tmp_path / "valid.jsonl")},
        optimization={"max_steps": 1},
    )
    with pytest.raises(UserError, match=r"can't read 4 of 4 .* evaluation.metric=rouge_l_unicode"):
        runs.train(raw)
    raw.setdefault("evaluation", {})["metric"] = "rouge_l_unicode"
    best = json.loads((runs.train(raw) / "summary.json").read_text())["best"]
    assert {"rouge_l_unicode", "exact_match"} <= best["scores"].keys()
    assert "rouge_l" not in best["scores"]


def test_rouge_is_not_claimed_where_its_tokenisation_reads_nothing(tmp_path):
    encoder = Encoder(tiny.tokenizer(), "none", 24, 10)
    examples = [Example("say", responses=("!?",)), Example("say", responses=("it is",))]
    data = evaluation_set(examples, encoder)
    rollouts = [Rollout(e.index, e.request_ids, e.response_ids, "student") for e in data.examples]
    first, second = score(rollouts, data, encoder.tokenizer, (tiny.EOS,), seed=0)
    assert first.scores == {"exact_match": 100}
    assert second.scores["rouge_l"] == 100
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    (tmp_path / "valid.jsonl").write_text('{"instruction": "say", "output": "!?"}\n')
    raw = tiny.recipe(tmp_path, data={"validation": str(tmp_path / "valid.jsonl")})
    with pytest.raises(UserError, match="rouge_l can't read 1 of 1 references"):
        runs.train(raw)
