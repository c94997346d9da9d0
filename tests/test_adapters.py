"""LoRA and prefix tuning as teachers: what PEFT says, what stays frozen, what is saved."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from promptkd.adapters import LoRA, Prefix, load_prefix
from promptkd.errors import UserError
from promptkd.teachers import SoftPrompt, TextPrompt

ARCHITECTURES = ("gpt2", "opt", "llama", "qwen3")
SPECIFICATIONS = {"lora": LoRA(), "prefix": Prefix(length=5)}
TOKENS = torch.randint(2, 98, (3, 9), generator=torch.Generator().manual_seed(3))
TEXT = "Suppose you are a student."


def frozen(architecture):
    module = tiny.model(architecture, num_layers=3, seed=2).requires_grad_(False)
    return tiny.language_model(module, tiny.ROWS)


def disturb(teacher, seed=0):
    """Move every parameter, so that the adapter says something of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def logprobs(teacher, hidden):
    return (hidden @ teacher.model.head.weight[: tiny.ROWS].T).log_softmax(-1)


@pytest.mark.parametrize("name", SPECIFICATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_loads_the_saved_adapter_to_the_same_logprobs(name, architecture, tmp_path):
    model = frozen(architecture)
    model.module.save_pretrained(tmp_path / "teacher")
    teacher = SPECIFICATIONS[name].build(model, tiny.tokenizer())
    disturb(teacher)
    teacher.save(tmp_path / "adapter", str(tmp_path / "teacher"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = loaded(
            input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)
        ).logits.log_softmax(-1)
        actual = logprobs(teacher, teacher.hidden_states(TOKENS))
        plain = logprobs(teacher, teacher.plain_hidden_states(TOKENS))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert (actual - plain).abs().max() > 0.01


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_gradients_are_those_of_pefts_own_model(name, tmp_path):
    model = frozen("llama")
    model.module.save_pretrained(tmp_path / "teacher")
    teacher = SPECIFICATIONS[name].build(model, tiny.tokenizer())
    disturb(teacher)
    teacher.save(tmp_path / "adapter", str(tmp_path / "teacher"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float32)
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    config.inference_mode = False
    loaded = peft.get_peft_model(base, config)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(loaded, saved)
    weights = torch.randn(3, 9, tiny.ROWS, generator=torch.Generator().manual_seed(1))
    output = loaded.eval()(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    (weights * output.log_softmax(-1)).sum().backward()
    hidden = teacher.hidden_states(TOKENS)
    teacher.plain_hidden_states(TOKENS)  # the plain teacher between forward and backward
    (weights * logprobs(teacher, hidden)).sum().backward()
    expected = [p.grad for p in loaded.parameters() if p.requires_grad]
    actual = [p.grad for p in teacher.parameters()]
    assert len(actual) == len(expected) > 0
    for own, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", SPECIFICATIONS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_plain_voice_is_the_teacher_as_it_came(name, architecture):
    expected = frozen(architecture).hidden_states(TOKENS)
    teacher = SPECIFICATIONS[name].build(frozen(architecture), tiny.tokenizer())
    disturb(teacher)
    teacher.hidden_states(TOKENS)
    assert torch.equal(teacher.plain_hidden_states(TOKENS), expected)
    assert torch.equal(teacher.model.hidden_states(TOKENS), expected)


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_only_the_adapter_gets_gradients(name):
    teacher = SPECIFICATIONS[name].build(frozen("llama"), tiny.tokenizer())
    disturb(teacher)
    teacher.hidden_states(TOKENS).square().sum().backward()
    own = {id(parameter) for parameter in teacher.parameters()}
    assert all(parameter.grad.abs().sum() > 0 for parameter in teacher.parameters())
    for parameter in teacher.model.module.parameters():
        assert id(parameter) in own or parameter.grad is None


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_a_state_brings_another_teacher_to_the_same_words(name):
    first, second = (
        SPECIFICATIONS[name].build(frozen("llama"), tiny.tokenizer()) for _ in range(2)
    )
    disturb(first)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.hidden_states(TOKENS), second.hidden_states(TOKENS))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_lora_starts_as_the_plain_teacher(architecture):
    teacher = LoRA().build(frozen(architecture), tiny.tokenizer())
    assert torch.equal(teacher.hidden_states(TOKENS), teacher.plain_hidden_states(TOKENS))


def test_lora_starts_alike_whatever_was_drawn_before_and_disturbs_no_other_draw():
    states = []
    for seed in (1, 2):
        model = frozen("gpt2")
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        states.append(LoRA().build(model, tiny.tokenizer()).state_dict())
        assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    other = LoRA(seed=1).build(frozen("gpt2"), tiny.tokenizer()).state_dict()
    assert any(not torch.equal(states[0][key], other[key]) for key in other)


def test_lora_stays_fp32_beside_a_bf16_teacher():
    module = tiny.model("llama").to(torch.bfloat16).requires_grad_(False)
    teacher = LoRA().build(tiny.language_model(module, tiny.ROWS, torch.bfloat16), tiny.tokenizer())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    assert teacher.hidden_states(TOKENS).dtype == torch.bfloat16


def test_lora_has_the_papers_number_of_parameters_on_gpt2():
    """Table 9: 1.229 M at rank 4 on GPT-2 XL, 48 joint projections of width 1600 to 4800."""
    teacher = LoRA(r=4).build(frozen("gpt2"), tiny.tokenizer())
    per_layer = 4 * (tiny.WIDTH + 3 * tiny.WIDTH)
    assert sum(p.numel() for p in teacher.parameters()) == 3 * per_layer
    assert 48 * 4 * (1600 + 4800) == 1_228_800


def test_lora_takes_the_layers_it_is_told():
    specification = LoRA(target_modules=["up_proj", "down_proj"])
    names = specification.build(frozen("llama"), tiny.tokenizer()).state_dict()
    assert {name.split(".")[-3] for name in names} == {"up_proj", "down_proj"}


def test_lora_on_layers_that_are_not_there_is_refused():
    with pytest.raises(UserError, match="target_modules"):
        LoRA(target_modules=["nothing"]).build(frozen("llama"), tiny.tokenizer())


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_prefix_starts_as_the_teacher_that_reads_the_text_first(architecture):
    tokenizer = tiny.tokenizer()
    length = len(tokenizer(TEXT).input_ids)
    prefixed = Prefix(length=length).build(frozen(architecture), tokenizer)
    prompted = TextPrompt(TEXT).build(frozen(architecture), tokenizer)
    torch.testing.assert_close(
        prefixed.hidden_states(TOKENS), prompted.hidden_states(TOKENS), atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("specification", [Prefix(length=512), SoftPrompt(length=512)])
def test_a_front_that_leaves_no_room_for_text_is_refused(specification):
    with pytest.raises(UserError, match="its context has 512"):
        specification.build(frozen("llama"), tiny.tokenizer())


def test_a_saved_prefix_is_read_back_as_it_was(tmp_path):
    teacher = Prefix(length=5).build(frozen("llama"), tiny.tokenizer())
    disturb(teacher)
    teacher.save(tmp_path, "teacher")
    again = load_prefix(frozen("llama"), tmp_path)
    assert torch.equal(again.hidden_states(TOKENS), teacher.hidden_states(TOKENS))
