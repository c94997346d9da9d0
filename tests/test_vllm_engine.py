"""vLLM writes what the transformers engine writes, with the weights of now."""

import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import runs
import tiny
from promptkd.adapters import add_lora, merged
from promptkd.config import recipe_from_dict
from promptkd.errors import UserError
from promptkd.evaluation.evaluate import evaluate
from promptkd.files import write_json_lines
from promptkd.generation import vllm_engine
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.generation.vllm_engine import VLLMEngine, whole_weights
from promptkd.models.language_model import LanguageModel

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports warn of many things
REQUESTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13), (14,)]
SEEDS = [(0, row) for row in range(len(REQUESTS))]


def test_a_machine_without_vllm_is_told_so_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl", 6)
    raw = tiny.recipe(tmp_path, sampling={"engine": "vllm"})
    with pytest.raises(UserError, match=r"pip install 'promptkd\[vllm\]'"):
        runs.train(raw)


def pair(**config):
    """A student's two engines."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    student = LanguageModel(tiny.model("llama", seed=3, width=128, **heads, **config), 98)
    return student, VLLMEngine(student, (tiny.EOS,), 64), TransformersEngine(student, (tiny.EOS,))


@pytest.fixture(scope="module")
def engines():
    return pair()


def assert_alike_after_an_update(student, ours, plain):
    decoding = GenerationSettings(12, temperature=0.0)
    before = ours.generate(REQUESTS, SEEDS, decoding)
    assert before == plain.generate(REQUESTS, SEEDS, decoding)
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    after = ours.generate(REQUESTS, SEEDS, decoding)
    assert after == plain.generate(REQUESTS, SEEDS, decoding)
    assert after != before


@runs.needs_vllm
def test_greedy_text_is_that_of_the_transformers_engine_also_after_an_update(engines):
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    assert_alike_after_an_update(*engines)
    assert (torch.get_num_threads(), torch.set_num_threads) == (threads, set_threads)


def lora_student():
    module = tiny.model("llama", seed=3, width=128, num_attention_heads=2, num_key_value_heads=1)
    add_lora(module, 4, 8, ("q_proj", "down_proj"), seed=0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return LanguageModel(module, 98)


def test_the_weights_of_a_lora_student_are_those_of_the_merged_model():
    student = lora_student()
    ours = dict(whole_weights(student))
    expected = dict(merged(student.module).named_parameters())

    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        assert_close(ours[name], weight[:98] if len(weight) == tiny.ROWS else weight.data)


@runs.needs_vllm
def test_an_engine_with_other_weights_than_the_students_is_refused(engines, monkeypatch):
    _, ours, _ = engines
    monkeypatch.setattr(ours, "_proven", False)
    monkeypatch.setattr(ours, "_push_weights", lambda: None)
    ours.generate(REQUESTS, SEEDS, GenerationSettings(4))
    student = ours._model.module.get_output_embeddings().weight
    monkeypatch.setattr(ours, "_proven", False)
    with torch.no_grad():
        kept = student.clone()
        student.neg_()
    with pytest.raises(UserError, match="vLLM writes something else than the student"):
        ours.generate(REQUESTS, SEEDS, GenerationSettings(4))
    with torch.no_grad():
        student.copy_(kept)


@runs.needs_vllm
def test_the_weights_of_a_model_that_does_not_learn_are_pushed_once(engines, monkeypatch):
    _, ours, _ = engines
    pushed: list[int] = []
    push = ours._push_weights
    monkeypatch.setattr(ours, "_push_weights", lambda: (pushed.append(1), push()))
    for learns, times in ((True, 2), (False, 1)):
        pushed.clear()
        monkeypatch.setattr(ours, "_learns", learns)
        monkeypatch.setattr(ours, "_proven", False)
        for _ in range(2):
            ours.generate(REQUESTS, SEEDS, GenerationSettings(2))
        assert len(pushed) == times


@runs.needs_vllm
def test_a_sample_is_a_function_of_its_seed_in_any_company(engines):
    _, ours, _ = engines
    together = ours.generate(REQUESTS, SEEDS, GenerationSettings(12))
    alone = [
        ours.generate([r], [s], GenerationSettings(12))[0]
        for r, s in zip(REQUESTS, SEEDS, strict=True)
    ]
    assert together == alone
    assert (
        ours.generate(REQUESTS, [(1, *seed) for seed in SEEDS], GenerationSettings(12)) != together
    )


@runs.needs_vllm
def test_a_stop_token_ends_a_response_and_is_part_of_it(engines):
    student, ours, _ = engines
    with torch.no_grad():
        student.module.get_output_embeddings().weight[tiny.EOS] *= 3
    requests, seeds = REQUESTS * 8, [(2, i) for i in range(8 * len(REQUESTS))]
    written = ours.generate(requests, seeds, GenerationSettings(12))
    ended = [r for r in written if r.token_ids[-1] == tiny.EOS]
    assert ended
    assert all(tiny.EOS not in r.token_ids[:-1] for r in written)
    assert all(len(r.token_ids) == 12 for r in written if r not in ended)


@runs.needs_vllm
@pytest.mark.parametrize(
    "decoding",
    [
        GenerationSettings(12),
        GenerationSettings(12, temperature=0.7, top_p=0.9, top_k=20),
        GenerationSettings(30, temperature=0.2, no_repeat_ngram_size=2),
    ],
)
def test_samples_are_those_of_the_transformers_engine(engines, decoding):
    _, ours, plain = engines
    requests, seeds = REQUESTS * 4, [(3, i) for i in range(4 * len(REQUESTS))]
    assert ours.generate(requests, seeds, decoding) == plain.generate(requests, seeds, decoding)


@runs.needs_vllm
def test_an_evaluation_writes_with_it_what_it_writes_without(tmp_path):
    wide = {"width": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "rows": 98}
    tiny.save_pair(tmp_path, student_options=wide)
    data = str(tiny.write_data(tmp_path / "test.jsonl", 5))
    both = [
        evaluate(
            str(tmp_path / "student"),
            data,
            seeds=(3, 4),
            max_request_tokens=24,
            max_response_tokens=12,
            template="none",
            precision="fp32",
            engine=engine,
            output=tmp_path / engine,
        )
        for engine in ("vllm", "transformers")
    ]
    assert both[0]["scores"] == both[1]["scores"]
    texts = [
        (tmp_path / e / "test.predictions.jsonl").read_text() for e in ("vllm", "transformers")
    ]
    assert texts[0] == texts[1]


@runs.needs_vllm
def test_a_run_whose_teacher_reads_more_is_the_same_with_either_engine(tmp_path):
    wide = {"width": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "rows": 98}
    tiny.save_pair(tmp_path, student_options=wide)
    rows = [{"instruction": f"say {i}", "hint": "so " * (i % 3 + 1)} for i in range(8)]
    write_json_lines(tmp_path / "train.jsonl", rows)
    losses = []
    for engine in ("vllm", "transformers"):
        raw = tiny.recipe(
            tmp_path,
            teacher={"context": "hint", "context_template": "{{ context }} ~ {{ request }}"},
            sampling={"engine": engine},
            optimization={"max_steps": 1, "optimizer": "sgd"},
            output=str(tmp_path / engine),
        )
        rows = runs.json_lines(runs.train(raw) / "metrics.jsonl")
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@runs.needs_vllm
def test_a_lora_student_writes_as_with_the_transformers_engine():
    """A second engine in one process: none that was there before can be used after it."""
    student, decoding = lora_student(), GenerationSettings(12, temperature=0.0)
    ours = VLLMEngine(student, (tiny.EOS,), 64)
    plain = TransformersEngine(student, (tiny.EOS,))

    assert ours.generate(REQUESTS, SEEDS, decoding) == plain.generate(REQUESTS, SEEDS, decoding)


class StandIn:
    """In place of the package: an engine that writes what it is told, and remembers its calls."""

    def __init__(self, text):
        self.text, self.calls, self.options = text, [], {}

    def module(self):
        module = types.ModuleType("vllm")
        module.SamplingParams = lambda **options: SimpleNamespace(**options)
        module.LLM = self.started
        return module

    def started(self, directory, *, seed=0, **options):
        if unknown := options.keys() & {"unheard_of"}:
            raise TypeError(f"unexpected keyword argument {unknown}")
        self.options = options
        return self

    def generate(self, requests, parameters, use_tqdm):
        self.calls.append("write")
        length = parameters[0].max_tokens
        output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.text[:length])])
        return [output] * len(requests)

    def collective_rpc(self, name, kwargs):
        self.calls.append(name)

    def apply_model(self, function):
        self.calls.append("pack")

    def reset_prefix_cache(self):
        pass

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self):
        self.calls.append("wake")


@pytest.fixture
def started(monkeypatch):
    student = LanguageModel(tiny.model("llama", seed=3), 98)

    def start(text, **options):
        engine = StandIn(text)
        monkeypatch.setitem(sys.modules, "vllm", engine.module())
        monkeypatch.setattr(vllm_engine, "_chosen_tokens", lambda: None)
        return engine, VLLMEngine(student, (tiny.EOS,), 64, options=options)

    return student, start


def likeliest(student, request, number):
    """Written greedily, by another engine."""
    plain = TransformersEngine(student, ())
    return plain.generate([request], [(0, 0)], GenerationSettings(number, 0.0))[0].token_ids


def test_the_first_request_is_scored_by_both_engines_once(started):
    student, start = started
    engine, ours = start(likeliest(student, REQUESTS[0], 4))
    ours.generate(REQUESTS[:1], SEEDS[:1], GenerationSettings(4))
    ours.generate(REQUESTS[:1], SEEDS[:1], GenerationSettings(4))
    push = ["reload_weights", "pack"]
    assert engine.calls == [*push, "write", "write", *push, "write"]

    _, ours = start((50, 51, 52, 53))
    with pytest.raises(UserError, match="vLLM writes something else than the student"):
        ours.generate(REQUESTS[:1], SEEDS[:1], GenerationSettings(4))


def test_an_engine_that_sleeps_is_woken_before_weights_are_pushed(started):
    student, start = started
    text = likeliest(student, REQUESTS[0], 4)
    engine, ours = start(text, enable_sleep_mode=True, gpu_memory_utilization=0.5)
    for _ in range(2):
        ours.generate(REQUESTS[:1], SEEDS[:1], GenerationSettings(4))
    push = ["reload_weights", "pack"]
    first = [*push, "write", "write", "sleep 2"]
    assert engine.calls == [*first, "wake", *push, "write", "sleep 2"]
    assert engine.options["gpu_memory_utilization"] == 0.5
    assert engine.options["enforce_eager"]


def test_options_replace_ours_and_unknown_ones_are_refused(started):
    _, start = started
    engine, _ = start((), enforce_eager=False)
    assert engine.options["enforce_eager"] is False
    with pytest.raises(UserError, match=r"unheard_of.* which vLLM doesn't take"):
        start((), unheard_of=1)


def test_on_a_gpu_it_writes_by_cuda_graphs(started, monkeypatch):
    _, start = started
    _, ours = start(())
    monkeypatch.setattr(LanguageModel, "device", torch.device("cuda"))
    options = ours._set_by_the_run(64)
    assert (options["enforce_eager"], options["gpu_memory_utilization"]) == (False, 0.3)


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        (
            {"engine": "transformers", "vllm": {"seed": 1}},
            "the engine is transformers: set engine: vllm",
        ),
        ({"engine": "vllm", "vllm": {"dtype": "half"}}, "vllm.dtype is set by the run itself"),
        ({"engine": "vllm", "vllm": {"tensor_parallel_size": 2}}, "start one process per GPU"),
        ({"engine": "vllm", "vllm": {"gpu_memory_utilization": 1.5}}, "it lies between 0 and 1"),
    ],
)
def test_options_that_vllm_cannot_be_given_are_refused_when_read(tmp_path, sampling, reason):
    with pytest.raises(UserError, match=reason):
        recipe_from_dict(tiny.recipe(tmp_path, sampling=sampling))


@runs.needs_vllm
def test_an_update_also_reaches_an_output_layer_that_is_the_embeddings():
    """The last here: with this engine goes what all of a process share."""
    assert_alike_after_an_update(*pair(tie_word_embeddings=True))
