"""A pruned student is its teacher with layers skipped, and the right ones are."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tiny
from promptkd.cli import main
from promptkd.errors import UserError
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.models.language_model import LanguageModel, proven
from promptkd.pruning import (
    evenly_spaced,
    init_student,
    keep_layers,
    layers_of,
    losses_without_each,
    only_layers,
    rank_layers,
)
from promptkd.rollouts import Rollout
from promptkd.token_losses import cross_entropies

TOKENS = torch.arange(2, 42).reshape(2, 20)


def save(directory: Path, module) -> str:
    module.save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return str(directory)


def silence(layer: torch.nn.Module) -> None:
    """Zero what the layer adds to the residual stream: the outputs of attention and MLP."""
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def own_text(teacher: PreTrainedModel, requests: list[tuple[int, ...]]) -> list[Rollout]:
    """What the teacher itself says, greedily: every layer that matters is needed for it."""
    engine = TransformersEngine(tiny.language_model(teacher, tiny.ROWS), (tiny.EOS,))
    seeds = [(0, index) for index in range(len(requests))]
    responses = engine.generate(requests, seeds, GenerationSettings(12, temperature=0.0))
    return [
        Rollout(index, request, response.token_ids, "teacher")
        for index, (request, response) in enumerate(zip(requests, responses, strict=True))
    ]


REQUESTS = [tuple(range(start, start + 5)) for start in range(2, 82, 10)]


@pytest.mark.parametrize("total", [2, 3, 7, 30])
def test_evenly_spaced_layers_are_distinct_sorted_and_hold_both_ends(total):
    for kept in range(2, total):
        layers = evenly_spaced(total, kept)
        assert (layers[0], layers[-1], len(set(layers))) == (0, total - 1, kept)
        assert layers == sorted(layers)
        gaps = [b - a for a, b in itertools.pairwise(layers)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_pruned_model_is_the_teacher_with_layers_skipped(architecture):
    teacher = tiny.model(architecture, num_layers=4)
    whole = teacher(TOKENS).logits
    kept = [0, 3]
    with torch.no_grad():
        student = keep_layers(teacher, kept)
        _, layers = layers_of(teacher)

        def skip(module, arguments, keywords, output):
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            return hidden if not isinstance(output, tuple) else (hidden, *output[1:])

        hooks = [
            layers[i].register_forward_hook(skip, with_kwargs=True)
            for i in range(4)
            if i not in kept
        ]
        expected = teacher(TOKENS).logits
        for hook in hooks:
            hook.remove()
        assert torch.allclose(student(TOKENS).logits, expected, atol=1e-5)
        assert not torch.allclose(expected, whole, atol=1e-2)
        assert torch.equal(teacher(TOKENS).logits, whole)
    assert student.config.num_hidden_layers == len(layers_of(student)[1]) == 2
    proven(LanguageModel(student, tiny.ROWS), "student")


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_running_with_some_layers_equals_the_pruned_model_and_is_undone(architecture):
    teacher = tiny.model(architecture, num_layers=4)
    model = tiny.language_model(teacher, tiny.ROWS)
    config = teacher.config.to_dict()
    with torch.no_grad():
        whole = model.hidden_states(TOKENS)
        with only_layers(teacher, [1, 2]):
            some = model.hidden_states(TOKENS)
        pruned = tiny.language_model(keep_layers(teacher, [1, 2]), tiny.ROWS).hidden_states(TOKENS)
        assert torch.allclose(some, pruned, atol=1e-5)
        assert torch.equal(model.hidden_states(TOKENS), whole)
    assert teacher.config.to_dict() == config


@pytest.mark.parametrize("search", ["single", "greedy"])
@pytest.mark.parametrize("idle", [1, 2])
def test_the_layer_that_does_nothing_is_the_one_that_goes(search, idle):
    teacher = tiny.model("llama", num_layers=4)
    silence(layers_of(teacher)[1][idle])
    kept, measured = rank_layers(
        tiny.language_model(teacher, tiny.ROWS), own_text(teacher, REQUESTS), 3, search
    )

    assert kept == [layer for layer in range(4) if layer != idle]
    assert measured["loss_without"][0][str(idle)] == pytest.approx(measured["loss_whole"])
    assert measured["loss_pruned"] == pytest.approx(measured["loss_whole"])


def test_greedy_search_measures_again_after_every_layer_it_drops():
    teacher = tiny.model("llama", num_layers=4)
    model = tiny.language_model(teacher, tiny.ROWS)
    _, measured = rank_layers(model, own_text(teacher, REQUESTS), 2, "greedy")
    first, second = measured["loss_without"]
    dropped = min(first, key=lambda layer: first[layer])

    assert (len(first), len(second)) == (4, 3)
    assert dropped not in second
    assert measured["loss_pruned"] == pytest.approx(min(second.values()))
    _, of_single = rank_layers(model, own_text(teacher, REQUESTS), 2, "single")
    assert of_single["loss_without"] == [pytest.approx(first)]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_losses_from_shared_lower_layers_are_those_of_whole_passes(architecture):
    teacher = tiny.model(architecture, num_layers=5)
    model, texts = tiny.language_model(teacher, tiny.ROWS), own_text(teacher, REQUESTS)
    kept = [0, 2, 3, 4]
    shared = dict(losses_without_each(model, texts, kept))
    naive = {}
    for layer in kept:
        with only_layers(teacher, [other for other in kept if other != layer]):
            naive[layer] = torch.cat(cross_entropies(texts, model, 2048)).mean().item()

    assert shared == pytest.approx(naive, rel=1e-6)
    assert len(set(naive.values())) == len(kept)


def test_a_search_runs_each_layer_below_the_missing_one_once():
    teacher = tiny.model("llama", num_layers=6)
    calls = []
    for layer in layers_of(teacher)[1]:
        layer.register_forward_hook(lambda *_: calls.append(1))
    model, texts = tiny.language_model(teacher, tiny.ROWS), own_text(teacher, REQUESTS)
    calls.clear()
    list(losses_without_each(model, texts, range(6)))
    above, once = sum(range(6)), 5
    assert len(calls) == above + once


def test_without_calibration_layers_are_evenly_spaced_and_the_output_loads(tmp_path):
    teacher = tiny.model("qwen2", num_layers=5)
    record = init_student(save(tmp_path / "teacher", teacher), 3, tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")

    assert (record["search"], record["kept"], record["dropped"]) == ("uniform", [0, 2, 4], [1, 3])
    with torch.no_grad():
        assert torch.equal(student(TOKENS).logits, keep_layers(teacher, [0, 2, 4])(TOKENS).logits)
    assert student.dtype == torch.float32
    own, other = (AutoTokenizer.from_pretrained(tmp_path / n) for n in ("student", "teacher"))
    assert own.get_vocab() == other.get_vocab()
    assert json.loads((tmp_path / "student" / "pruning.json").read_text()) == record


def test_with_calibration_the_idle_layer_is_dropped_and_the_losses_are_recorded(tmp_path):
    teacher = tiny.model("llama", num_layers=4)
    silence(layers_of(teacher)[1][2])
    tokenizer = tiny.tokenizer()
    texts = [
        (tokenizer.decode(rollout.request_ids), tokenizer.decode(rollout.response_ids))
        for rollout in own_text(teacher, REQUESTS)
    ]
    rows = [json.dumps({"request": request, "response": text}) + "\n" for request, text in texts]
    data = str(tmp_path / "d.jsonl")
    Path(data).write_text("".join(rows))
    record = init_student(
        save(tmp_path / "teacher", teacher),
        3,
        tmp_path / "student",
        calibration=data,
        template="none",
    )

    assert (record["search"], record["dropped"]) == ("greedy", [2])
    assert record["calibration"] == [data]
    assert record["loss_pruned"] == pytest.approx(record["loss_whole"])


def test_calibration_follows_the_columns_and_the_options_of_the_template(tmp_path):
    teacher = tiny.model("llama", num_layers=3)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ opening }}{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = [{"q": f"say {i}", "a": f"it is {i}!"} for i in range(6)]
    reading = {
        "columns": {"request": "q", "response": "a"},
        "template_options": {"opening": "please "},
        "num_calibration_rows": 2,
    }
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    record = init_student(
        teacher, 2, tmp_path / "student", calibration=rows, tokenizer=tokenizer, **reading
    )
    assert record["calibration"] == ["object:6 rows (list)"]
    assert record["teacher"] == "object:LlamaForCausalLM"
    assert all(torch.equal(before[name], now) for name, now in teacher.state_dict().items())
    asked = [f"please {row['q']}" for row in rows]
    pairs = [(text, row["a"]) for text, row in zip(asked, rows, strict=True)]
    assert record["loss_whole"] == pytest.approx(_loss_of(teacher, tokenizer, pairs[:2]), rel=1e-3)
    with pytest.raises(UserError, match=r"data\.columns\.reqest"):
        init_student(
            teacher,
            2,
            tmp_path / "other",
            calibration=rows,
            tokenizer=tokenizer,
            columns={"reqest": "q"},
        )


def _loss_of(model, tokenizer, pairs: list[tuple[str, str]]) -> float:
    """Nats per response token, the end included, in float64."""
    losses = []
    for request, response in pairs:
        ids = tokenizer(request).input_ids
        whole = [*ids, *tokenizer(response).input_ids, tiny.EOS]
        logits = copy.deepcopy(model).double()(torch.tensor([whole])).logits[0].log_softmax(-1)
        losses += [-logits[i - 1, whole[i]].item() for i in range(len(ids), len(whole))]
    return sum(losses) / len(losses)


def test_the_command_takes_columns_as_a_recipe_does(tmp_path, capsys):
    teacher = save(tmp_path / "teacher", tiny.model("llama", num_layers=3))
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"q": f"say {i}", "a": "it is!"}) + "\n" for i in range(4)))
    command = ["init-student", "--teacher", teacher, "--layers", "2", "--calibration", str(data)]
    command += ["--template", "none", "--output", str(tmp_path / "student"), "--set"]
    with pytest.raises(SystemExit):
        main([*command, "seed=1"])
    assert "--set takes data.columns" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*command, "data.columns.request=q", "data.columns.response=a"])
    assert ended.value.code == 0
    assert "layers dropped: [" in capsys.readouterr().out


@pytest.mark.parametrize("num_layers", [0, 4, 5])
def test_a_number_of_layers_that_makes_no_student_is_refused(tmp_path, num_layers):
    teacher = save(tmp_path / "teacher", tiny.model("gpt2", num_layers=4))
    with pytest.raises(UserError, match="the teacher has 4 layers, so a student keeps 1 to 3"):
        init_student(teacher, num_layers, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_an_output_that_holds_something_is_refused(tmp_path):
    teacher = save(tmp_path / "teacher", tiny.model("gpt2", num_layers=3))
    with pytest.raises(UserError, match="teacher exists and is not empty"):
        init_student(teacher, 2, teacher)


def test_calibration_rows_without_a_response_are_refused(tmp_path):
    teacher = save(tmp_path / "teacher", tiny.model("gpt2", num_layers=3))
    data = str(tiny.write_data(tmp_path / "d.jsonl", with_output=False))
    with pytest.raises(UserError, match=r"d\.jsonl has rows without a reference response"):
        init_student(teacher, 2, tmp_path / "student", calibration=data, template="none")
