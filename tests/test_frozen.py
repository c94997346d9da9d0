"""A teacher held in fewer bits, or off the device, still speaks and still hands the gradient on."""

import importlib.util
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import runs
import tiny
from promptkd.adapters import LoRA
from promptkd.config import recipe_from_dict
from promptkd.errors import UserError
from promptkd.evaluation.finished_run import load_run
from promptkd.generation.response_cache import fingerprint
from promptkd.models.frozen import Int8Linear, NF4Linear, OffloadedLinear, Storage
from promptkd.models.language_model import LanguageModel, proven
from promptkd.models.loading import load_language_model, load_model
from promptkd.models.sizes import num_parameters
from promptkd.models.vocabularies import same_weights
from promptkd.teachers import SoftPrompt
from promptkd.training.preflight import check_gradient

CPU = torch.device("cpu")
QUANTIZED = [Storage("8bit"), Storage("4bit")]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes isn't installed"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes' imports warn of many things


class Int8(nn.Parameter):
    """As bitsandbytes holds a matrix: with the largest magnitude of each row."""

    SCB: torch.Tensor


class NF4(nn.Parameter):
    """As bitsandbytes holds a matrix in four bits: two codes a byte, a scale for 64 numbers."""

    quant_state: SimpleNamespace


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pair wide enough for a 4-bit block of 64 weights."""
    directory = tmp_path_factory.mktemp("pair")
    wide = {"width": 64}
    tiny.save_pair(directory, student_options=wide, teacher_options=wide)
    tiny.write_data(directory / "train.jsonl")
    return directory


@pytest.mark.parametrize("shape", [(4, 64), (4, 96), (5, 6)])
def test_four_bits_are_the_codes_of_each_block_times_its_scale(shape):
    """Whole blocks, rows of one and a half, and less than one in all."""
    rows, width = shape
    generator = torch.Generator().manual_seed(0)
    code = torch.linspace(-1, 1, 16)
    chosen = torch.randint(16, (rows * width,), generator=generator)
    scale = torch.rand(-(-rows * width // 64), generator=generator)
    held = nn.Linear(width, rows, bias=False, device="meta")
    held.weight = NF4((16 * chosen[::2] + chosen[1::2]).to(torch.uint8)[:, None], False)
    held.weight.quant_state = SimpleNamespace(absmax=scale, code=code, blocksize=64)
    expected = [scale[i // 64].item() * code[k].item() for i, k in enumerate(chosen.tolist())]

    restored = NF4Linear(held).restored(torch.ones(()))
    assert_close(restored, torch.tensor(expected).view(shape))


def as_linear(frozen):
    """An ordinary layer of the weights that a frozen one multiplies with."""
    plain = nn.Linear(frozen.in_features, frozen.out_features, bias=frozen.bias is not None)
    plain.weight.data = frozen.restored(torch.ones(()))
    return plain


def prompted(model, seed=0):
    """States of a prompted pass, and the gradient of a random sum of them to the prompt."""
    generator = torch.Generator().manual_seed(seed)
    prompt = nn.Parameter(torch.randn(3, 64, generator=generator))
    tokens = torch.randint(2, tiny.ROWS, (2, 9), generator=generator)
    hidden = model.hidden_states(tokens, prompt)
    loss = (hidden * torch.randn(hidden.shape, generator=generator)).sum()
    return hidden.detach(), torch.autograd.grad(loss, prompt)[0]


def test_eight_bits_are_the_rows_integers_times_their_scale():
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(6, 4)
    scale = plain.weight.detach().abs().amax(1)
    integers = (127 * plain.weight.detach() / scale[:, None]).round().to(torch.int8)
    held = nn.Linear(6, 4, bias=False, device="meta")
    held.weight = Int8(integers, requires_grad=False)
    held.weight.SCB = scale
    frozen = Int8Linear(held)
    tokens = torch.randn(5, 6, generator=generator, requires_grad=True)
    upstream = torch.randn(5, 4, generator=generator)
    result = frozen(tokens)
    result.backward(upstream)

    exact = integers.double() * scale.double()[:, None] / 127
    assert_close(result.detach(), (tokens.detach().double() @ exact.T).float())
    assert_close(tokens.grad, (upstream.double() @ exact).float())
    assert ((exact - plain.weight).abs() <= scale[:, None] / 254 + 1e-7).all()


@needs_bitsandbytes
@pytest.mark.parametrize("storage", QUANTIZED, ids=lambda s: s.quantization)
def test_the_prompts_gradient_is_that_through_the_rounded_weights_after_any_pass(saved, storage):
    """A pass without gradient comes first: bitsandbytes' own 4-bit layer loses it by that."""
    name = str(saved / "teacher")
    model = load_language_model(name, "fp32", storage=storage)
    with torch.no_grad():
        model.hidden_states(torch.arange(2, 12)[None])
    plain = load_language_model(name, "fp32")
    for place, part in list(model.module.base_model.named_modules()):
        if isinstance(part, nn.Linear):
            plain.module.base_model.set_submodule(place, as_linear(part))

    for ours, expected in zip(prompted(model), prompted(plain), strict=True):
        assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize(("storage", "share"), [(Storage("8bit"), 0.02), (Storage("4bit"), 0.15)])
def test_what_is_rounded_is_near_the_weights(saved, storage, share):
    """By the relative error of all weights; a normal one's is 0.7 % in 8 bits, 9 % in NF4."""
    module = load_model(str(saved / "teacher"), torch.float32, storage=storage)
    whole = load_model(str(saved / "teacher"), torch.float32)
    for place, part in module.base_model.named_modules():
        if isinstance(part, nn.Linear):
            weight = whole.base_model.get_submodule(place).weight
            error = part.restored(torch.ones(())) - weight
            assert 0 < error.norm() / weight.norm() < share


@needs_bitsandbytes
@pytest.mark.parametrize("storage", QUANTIZED, ids=lambda s: s.quantization)
def test_a_row_says_the_same_in_any_company(saved, storage):
    model = load_language_model(str(saved / "teacher"), "fp32", storage=storage)
    tokens = torch.randint(2, 90, (3, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together, alone = model.hidden_states(tokens), model.hidden_states(tokens[:1])

    assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)


@needs_bitsandbytes
@pytest.mark.parametrize("storage", QUANTIZED, ids=lambda s: s.quantization)
def test_a_quantised_model_counts_what_it_stands_for_and_is_another_than_the_whole(saved, storage):
    module = load_model(str(saved / "teacher"), torch.float32, storage=storage)
    whole = load_model(str(saved / "teacher"), torch.float32)
    models = [LanguageModel(each, tiny.ROWS) for each in (module, whole)]

    assert num_parameters(module) == num_parameters(whole)
    assert models[0].num_trunk_weights == models[1].num_trunk_weights
    assert fingerprint(module) != fingerprint(whole)
    assert not same_weights(module, whole)


@needs_bitsandbytes
@pytest.mark.parametrize("storage", QUANTIZED, ids=lambda s: s.quantization)
def test_lora_learns_on_quantised_layers(saved, storage):
    model = load_language_model(str(saved / "teacher"), "fp32", storage=storage)
    check_gradient(LoRA(r=2).build(model, None))


def offloaded(saved):
    module = load_model(str(saved / "teacher"), torch.float32)
    Storage(offload=True).apply(module.requires_grad_(False), "the teacher")
    return proven(LanguageModel(module, tiny.ROWS), "the teacher")


def test_fetched_weights_give_the_same_and_stay_out_of_the_graph(saved):
    model, whole = offloaded(saved), load_language_model(str(saved / "teacher"), "fp32")
    layers = [part for part in model.module.modules() if isinstance(part, OffloadedLinear)]
    weights = {layer.weight.data_ptr() for layer in layers}
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.add(tensor.data_ptr()), tensor)[1], lambda tensor: tensor
    ):
        ours = prompted(model)

    assert len(layers) == 3 * 7
    assert kept
    assert not kept & weights
    for own, expected in zip(ours, prompted(whole), strict=True):
        assert_close(own, expected)


def test_offloaded_weights_stay_where_they_are_when_the_model_moves(saved):
    module = offloaded(saved).module
    before = [p.data_ptr() for p in module.base_model.layers.parameters() if p.dim() == 2]
    module.to("meta")
    after = [p for p in module.base_model.layers.parameters() if p.dim() == 2]

    assert [p.data_ptr() for p in after] == before
    assert module.get_input_embeddings().weight.is_meta


def test_a_teacher_without_gradient_is_refused(saved):
    model = load_language_model(str(saved / "teacher"), "fp32")
    teacher = SoftPrompt(length=3, init="random").build(model, None)
    check_gradient(teacher)
    with torch.no_grad():
        model.module.base_model.norm.weight.zero_()
    with pytest.raises(UserError, match="has the norm 0"):
        check_gradient(teacher)
    with torch.no_grad():
        model.module.base_model.norm.weight.fill_(torch.inf)
    with pytest.raises(UserError, match=r"has the norm (nan|inf)"):
        check_gradient(teacher)


def test_a_package_that_is_missing_is_named(saved, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'promptkd\[quantization\]'"):
        load_model(str(saved / "teacher"), torch.float32, storage=Storage("8bit"))


def test_offloading_to_the_device_that_computes_is_refused(saved, tmp_path):
    raw = tiny.recipe(saved, teacher={"offload": True}, output=str(tmp_path / "run"))
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"teacher.offload is true, but this run computes on the"):
        runs.train(raw)


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"quantization": "8bit", "offload": True}, "choose one"),
        ({"quantization": "4bit", "model": "student"}, "the model is the student's"),
        ({"quantization": "2bit"}, "8bit"),
    ],
)
def test_settings_that_make_no_sense_are_refused_when_read(saved, teacher, said):
    with pytest.raises(UserError, match=said):
        recipe_from_dict(tiny.recipe(saved, teacher=teacher))


@needs_bitsandbytes
def test_a_lora_is_not_quantised(saved, tmp_path):
    raw = tiny.recipe(
        saved,
        method={"name": "sft"},
        student={"lora": {"r": 2}},
        optimization={"max_steps": 1},
        output=str(tmp_path / "run"),
    )
    name = str(runs.train(raw))
    with pytest.raises(UserError, match=r"needs a whole model .* is a LoRA"):
        load_model(name, torch.float32, storage=Storage("8bit"))


@needs_bitsandbytes
def test_a_run_with_a_quantised_teacher_says_so_resumes_and_is_no_other_run(saved, tmp_path):
    raw = tiny.recipe(
        saved,
        teacher={"quantization": "8bit"},
        optimization={"max_steps": 2},
        checkpoints={"every_steps": 1},
        output=str(tmp_path / "run"),
    )
    run = runs.train(raw)
    whole = runs.result(run)
    record = json.loads((run / "environment.json").read_text())
    shutil.rmtree(run / "checkpoints" / "step-000002")
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match=r"teacher.quantization '8bit' -> '4bit'"):
        runs.train(raw | {"teacher": raw["teacher"] | {"quantization": "4bit"}})
    runs.train(raw)

    assert record["identity"]["recipe"]["teacher"]["quantization"] == "8bit"
    assert runs.result(run) == whole
    teacher = load_run(run, "this test").teacher.module
    assert any(isinstance(part, Int8Linear) for part in teacher.modules())
