import json
from pathlib import Path

import pytest
import torch

from promptkd.api import train
from promptkd.config import recipe_from_dict
from promptkd.divergences import kl
from promptkd.errors import UserError
from promptkd.evaluation.prompt_analysis import (
    compare_with_tokens,
    describe_vectors,
    prompt_analysis,
)
from promptkd.methods import promptkd
from promptkd.models.language_model import LanguageModel
from promptkd.models.loading import load_language_model
from promptkd.teachers import load_soft_prompt, prompt_vectors
from tiny import model, recipe, save_pair, tokenizer, write_data

NUM_TRAIN, NUM_VALIDATION, INIT = 8, 5, "help"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of PromptKD: train and validation data with references."""
    directory = tmp_path_factory.mktemp("analysis")
    save_pair(directory)
    write_data(directory / "train.jsonl", NUM_TRAIN)
    validation = write_data(directory / "validation.jsonl", NUM_VALIDATION)
    raw = recipe(
        directory,
        method={"name": "promptkd", "length": 4, "init_text": INIT},
        data={"validation": str(validation), "max_response_tokens": 10},
        optimization={"max_steps": 2, "teacher_learning_rate": 0.1},
    )
    return train(recipe_from_dict(raw))


@pytest.fixture(scope="module")
def analysis(run):
    return prompt_analysis(run, num_shown=2)


def rows(analysis, part, **where):
    return [r for r in analysis[part] if all(r[key] == value for key, value in where.items())]


# -- vectors


def test_a_vector_on_its_token_has_not_moved_and_is_its_own_neighbour():
    language = LanguageModel(model("gpt2"), 98)
    start = prompt_vectors(language, [40, 7])
    for row, token in zip(
        describe_vectors(start, start, language, tokenizer(), 3), (40, 7), strict=True
    ):
        assert row["initial_token"]["id"] == token
        assert row["moved"] == row["moved_share"] == 0.0
        assert row["cosine_to_initial"] == pytest.approx(1.0)
        assert row["nearest_by_distance"][0] == {
            "id": token,
            "token": tokenizer().convert_ids_to_tokens(token),
            "distance": 0.0,
        }
        assert row["nearest_by_cosine"][0]["id"] == token
        assert len(row["nearest_by_cosine"]) == 3


def test_a_stretched_vector_keeps_its_direction_and_not_its_place():
    language = LanguageModel(model("gpt2"), 98)
    start = prompt_vectors(language, [40])
    (row,) = describe_vectors(start, 3 * start, language, tokenizer(), 2)
    assert row["moved_share"] == pytest.approx(2.0)
    assert row["norm"] == pytest.approx(3 * row["initial_norm"])
    assert row["nearest_by_cosine"][0]["id"] == 40
    assert row["nearest_by_cosine"][0]["cosine"] == pytest.approx(1.0)
    assert row["nearest_by_distance"][0]["distance"] == pytest.approx(row["moved"], rel=0.5)


def test_neighbours_are_those_of_a_naive_search_over_several_pieces(monkeypatch):
    monkeypatch.setattr("promptkd.evaluation.prompt_analysis.TOKENS_AT_ONCE", 30)
    language = LanguageModel(model("llama"), 98)
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    cosines, distances = compare_with_tokens(vectors, language)
    table = language.module.get_input_embeddings().weight[:98].double()
    for i, vector in enumerate(vectors.double()):
        for j, embedding in enumerate(table):
            cosine = (vector @ embedding / vector.norm() / embedding.norm()).item()
            assert cosines[i, j].item() == pytest.approx(cosine, abs=1e-5)
            assert distances[i, j].item() == pytest.approx((vector - embedding).norm().item())


def test_gemmas_scaled_embeddings_are_compared_as_the_trunk_receives_them():
    language = LanguageModel(model("gemma2"), 98)
    start = prompt_vectors(language, [40])
    _, distances = compare_with_tokens(start, language)
    assert distances[0].argmin() == 40
    assert distances[0, 40] == 0


def test_the_runs_vectors_are_measured_from_its_own_start(run, analysis):
    teacher = json.loads((run / "environment.json").read_text())["identity"]["recipe"]["teacher"]
    ids = tokenizer()(INIT, add_special_tokens=False).input_ids
    start = prompt_vectors(load_language_model(teacher["model"], "fp32"), ids)
    moved = (load_soft_prompt(run / "teacher_adapter") - start).norm(dim=-1)
    assert moved.min() > 0
    assert [row["moved"] for row in analysis["vectors"]] == pytest.approx(moved.tolist())
    assert [row["initial_token"]["token"] for row in analysis["vectors"]] == list(INIT)


# -- table 4


def test_table_4_has_a_row_for_each_set_author_and_teacher(analysis):
    found = [(row["data"], row["responses"], row["prompt"]) for row in analysis["table_4"]]
    assert found == [
        (data, responses, prompt)
        for data in ("train", "validation")
        for responses in ("student", "reference")
        for prompt in (False, True)
    ]
    assert analysis["num_examples"] == {"train": NUM_TRAIN, "validation": NUM_VALIDATION}


def test_kls_of_the_references_are_those_of_a_naive_loop(run, analysis):
    recorded = json.loads((run / "environment.json").read_text())["identity"]["recipe"]
    teacher, first, final = (
        load_language_model(str(name), "fp32")
        for name in (recorded["teacher"]["model"], recorded["student"]["model"], run)
    )
    prompt = load_soft_prompt(run / "teacher_adapter")
    sums, count = dict.fromkeys(("plain", "prompted", "drift", "reverse"), 0.0), 0
    for line in Path(recorded["data"]["validation"][0]).read_text().splitlines():
        row = json.loads(line)
        request = tokenizer()(row["instruction"]).input_ids
        response = [*tokenizer()(row["output"]).input_ids, 0][:10]
        ids = torch.tensor([[*request, *response]])
        embedded = teacher.module.get_input_embeddings()(ids)
        with torch.no_grad():
            q0, q = (m.module(ids).logits[0].double().log_softmax(-1) for m in (first, final))
            p = teacher.module(ids).logits[0].double().log_softmax(-1)
            front = torch.cat([prompt[None], embedded], dim=1)
            p_prompted = teacher.module(inputs_embeds=front).logits[0, len(prompt) :]
            p_prompted = p_prompted.double().log_softmax(-1)
        scored = slice(len(request) - 1, len(request) - 1 + len(response))
        count += len(response)
        for name, (a, b) in {
            "plain": (p, q0),
            "prompted": (p_prompted, q0),
            "drift": (p_prompted, p),
            "reverse": (q, p_prompted),
        }.items():
            sums[name] += kl(a[scored], b[scored]).sum().item()
    plain, prompted = rows(analysis, "table_4", data="validation", responses="reference")
    (drift,) = rows(analysis, "drift", data="validation", responses="reference")
    measured = {
        "plain": plain["kl_teacher_first_student"],
        "prompted": prompted["kl_teacher_first_student"],
        "drift": drift["kl_prompted_plain"]["mean"],
        "reverse": prompted["kl_final_student_teacher"],
    }
    for name, value in measured.items():
        assert value == pytest.approx(sums[name] / count, rel=1e-3)
    assert plain["kl_teacher_first_student"] != prompted["kl_teacher_first_student"]


def test_differences_are_the_prompted_row_minus_the_plain_one(analysis):
    for difference in analysis["differences"]:
        where = {key: difference[key] for key in ("data", "responses")}
        plain, prompted = rows(analysis, "table_4", **where)
        for name in difference.keys() - where.keys():
            expected = prompted[name] - plain[name]
            low, high = difference[name]["interval_95"]
            assert difference[name]["mean"] == pytest.approx(expected, abs=1e-6)
            assert low <= difference[name]["mean"] <= high
        assert {"kl_teacher_final_student", "rouge_l", "response_length"} <= difference.keys()


def test_a_student_that_did_not_train_is_as_far_as_it_was(tmp_path):
    save_pair(tmp_path)
    write_data(tmp_path / "train.jsonl", 4)
    rates = {"learning_rate": 0.0, "teacher_learning_rate": 0.0, "max_steps": 1}
    run = train(recipe_from_dict(recipe(tmp_path, optimization=rates)))
    analysis = prompt_analysis(run)
    assert {row["data"] for row in analysis["table_4"]} == {"train"}  # no validation data
    assert all(row["moved"] == 0 for row in analysis["vectors"])
    for row in analysis["table_4"]:
        assert row["kl_teacher_first_student"] == row["kl_teacher_final_student"]
    (drift, _) = analysis["drift"]
    assert drift["kl_prompted_plain"]["mean"] > 0.01  # the written words alone say something


# -- the file


def test_the_file_holds_the_analysis_with_responses_side_by_side(run, analysis):
    assert json.loads((run / "prompt_analysis.json").read_text()) == analysis
    shown = rows(analysis, "responses", data="validation")
    assert [row["request"] for row in shown] == ["say 0", "say 1?"]
    assert {"teacher", "prompted_teacher", "student", "references"} <= shown[0].keys()
    assert analysis["definition"].keys() >= set(analysis["table_4"][0]) - {"data", "prompt"}
    assert not list(run.glob(".*"))


def test_data_without_references_is_forced_on_the_students_responses_only(run, tmp_path):
    bare = write_data(tmp_path / "bare.jsonl", 3, with_output=False)
    analysis = prompt_analysis(run, str(bare), num_examples=3)
    held_out = rows(analysis, "table_4", data="validation")
    assert [row["responses"] for row in held_out] == ["student", "student"]
    assert "rouge_l" not in held_out[0]
    assert held_out[0]["response_length"] > 0
    assert analysis["data"]["validation"] == [str(bare)]


def test_a_run_without_a_soft_prompt_is_refused(tmp_path):
    save_pair(tmp_path)
    write_data(tmp_path / "train.jsonl", 4)
    raw = recipe(tmp_path, method={"name": "gkd"}, optimization={"max_steps": 1})
    with pytest.raises(UserError, match="no soft prompt to analyse"):
        prompt_analysis(train(recipe_from_dict(raw)))


def test_a_method_composed_in_python_has_to_be_given_again(tmp_path):
    save_pair(tmp_path)
    write_data(tmp_path / "train.jsonl", 4)
    method = promptkd(length=2, init_text="ok")
    run = train(recipe_from_dict(recipe(tmp_path, optimization={"max_steps": 1})), method)
    with pytest.raises(UserError, match="pass it as method="):
        prompt_analysis(run)
    tokens = [
        row["initial_token"]["token"] for row in prompt_analysis(run, method=method)["vectors"]
    ]
    assert tokens == ["o", "k"]
