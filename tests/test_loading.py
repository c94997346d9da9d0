"""What is loaded is the checkpoint, whole; everything else is refused in a sentence."""

import gc
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

import runs
import tiny
from promptkd.adapters import add_lora
from promptkd.errors import UserError
from promptkd.models.loading import (
    dtype_of,
    load_language_model,
    load_model,
    load_tokenizer,
    stop_ids,
)


@pytest.fixture
def saved(tmp_path):
    return tiny.save_pair(tmp_path)[1]


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        load_model(str(path), torch.float32)
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(path, change):
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_weights_under_a_wrappers_prefix_are_refused_with_count_and_names(saved, prefix):
    rewrite(saved, lambda weights: {prefix + key: value for key, value in weights.items()})
    said = refused(saved)
    assert "30 weights of LlamaForCausalLM are missing from the checkpoint" in said
    assert "wrapper's prefix" in said


def test_a_checkpoint_without_its_last_layer_or_with_one_more_is_refused(saved):
    rewrite(saved, lambda w: {key: value for key, value in w.items() if ".layers.2." not in key})
    assert "9 weights of LlamaForCausalLM are missing" in refused(saved)
    tiny.model("llama", num_layers=3, seed=2).save_pretrained(saved)
    edit(saved / "config.json", num_hidden_layers=2)
    assert "9 weights of LlamaForCausalLM stand in the checkpoint, but" in refused(saved)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(saved, poison):
    rewrite(saved, lambda w: w | {"model.norm.weight": w["model.norm.weight"] * poison})
    assert "model.norm.weight holds NaN or infinite numbers" in refused(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 48},
        {"model_type": "nothing-like-it"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
        {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ],
)
def test_a_configuration_unlike_the_weights_or_the_machine_is_a_sentence(saved, changes):
    edit(saved / "config.json", **changes)
    assert "is not a model that can be loaded" in refused(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_damaged_files_are_a_sentence(saved, name, content):
    (saved / name).write_bytes(content)
    load = load_model if name == "config.json" else lambda path, _: load_tokenizer(path)
    with pytest.raises(UserError, match="is not a model that can be loaded"):
        load(str(saved), torch.float32)


def test_pickled_objects_are_not_run(saved, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (saved / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, saved / "pytorch_model.bin")
    refused(saved)
    assert not (tmp_path / "ran").exists()


def test_a_generation_config_that_cannot_be_saved_is_mended_and_said(saved, tmp_path, capsys):
    edit(saved / "generation_config.json", do_sample=False, temperature=0.9, top_p=0.6)
    module = load_model(str(saved), torch.float32)
    module.save_pretrained(tmp_path / "again")
    assert "couldn't be saved again; it goes on with do_sample: true" in capsys.readouterr().err
    assert (module.generation_config.temperature, module.generation_config.top_p) == (0.9, 0.6)


def lora(base, where, **options):
    module = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    peft.get_peft_model(module, config).save_pretrained(where)
    return where


def test_a_lora_without_a_tokenizer_has_its_bases(saved, tmp_path):
    path = lora(saved, tmp_path / "lora")
    assert load_tokenizer(str(path)).get_vocab() == load_tokenizer(str(saved)).get_vocab()
    assert load_model(str(path), torch.float32).config.num_hidden_layers == 3


def test_adapters_without_a_base_or_of_another_kind_are_a_sentence(saved, tmp_path):
    path = lora(saved, tmp_path / "lora")
    edit(path / "adapter_config.json", base_model_name_or_path=None)
    assert "names no base model" in refused(path)
    module = AutoModelForCausalLM.from_pretrained(saved)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    peft.get_peft_model(module, config).save_pretrained(tmp_path / "prompt")
    assert "can't be merged into a model" in refused(tmp_path / "prompt")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_that_added_a_token_resizes_its_base(saved, tmp_path):
    tokenizer: PreTrainedTokenizerFast = tiny.tokenizer()
    tokenizer.add_tokens([f"<tool {i}>" for i in range(10)])
    base = AutoModelForCausalLM.from_pretrained(saved)
    base.resize_token_embeddings(len(tokenizer))
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "added")
    tokenizer.save_pretrained(tmp_path / "added")
    module = load_model(str(tmp_path / "added"), torch.float32)
    assert module.get_input_embeddings().weight.shape[0] == len(tokenizer) > tiny.ROWS


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_lora_on_the_output_layer_is_refused(layer):
    with pytest.raises(UserError, match="where it would not be trained"):
        add_lora(tiny.model("llama"), 2, 4, ["q_proj", layer], 0)


def test_a_student_is_saved_in_the_precision_it_came_in_and_ends_as_the_pair_does(tmp_path):
    student, teacher = tiny.save_pair(tmp_path)
    tiny.model("llama", seed=1).bfloat16().save_pretrained(student)
    edit(teacher / "generation_config.json", eos_token_id=[0, 5])
    tiny.write_data(tmp_path / "train.jsonl")
    assert dtype_of(str(student)) == torch.bfloat16
    run = runs.train(tiny.recipe(tmp_path, optimization={"max_steps": 1}))
    weights = load_file(run / "student" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert json.loads((run / "student" / "config.json").read_text())["dtype"] == "bfloat16"
    generation = json.loads((run / "student" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 5]


def test_a_student_equal_to_its_teacher_is_refused(tmp_path):
    student, teacher = tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    load_model(str(student), torch.float32).save_pretrained(teacher)
    with pytest.raises(UserError, match="has its teacher's weights"):
        runs.train(tiny.recipe(tmp_path))


def test_an_added_padding_token_without_a_row_matters_only_where_it_is_used(tmp_path):
    student, teacher = tiny.save_pair(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(tiny.ROWS - len(tokenizer))])
    tokenizer.save_pretrained(teacher)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(student)
    tiny.write_data(tmp_path / "train.jsonl")
    runs.train(tiny.recipe(tmp_path, optimization={"max_steps": 1}))
    (tmp_path / "train.jsonl").write_text('{"instruction": "say [PAD]", "output": "it"}\n' * 4)
    with pytest.raises(UserError, match=r"train.jsonl:1: .* holds the token '\[PAD\]'"):
        runs.train(tiny.recipe(tmp_path, output=str(tmp_path / "other")))


@pytest.mark.parametrize("token", [-1, 10**30, True, "0", [0, 5000]], ids=repr)
def test_what_is_no_token_of_the_model_ends_no_response(saved, token):
    edit(saved / "generation_config.json", eos_token_id=token)
    module = load_model(str(saved), torch.float32)
    with pytest.raises(UserError, match="which is no token id of this model"):
        stop_ids(load_tokenizer(str(saved)), module)


@pytest.mark.parametrize("content", [b"", b"{{", b"[1]", b"\xff"])
def test_a_damaged_generation_config_is_not_passed_over(saved, content):
    (saved / "generation_config.json").write_bytes(content)
    assert "generation_config.json is damaged" in refused(saved)


def test_an_adapter_of_another_model_is_refused(saved, tmp_path):
    path = lora(saved, tmp_path / "lora")
    edit(path / "adapter_config.json", base_model_name_or_path=str(tmp_path / "student"))
    assert "wasn't made for its base" in refused(path)
    edit(path / "adapter_config.json", base_model_name_or_path=3)
    assert "is 3, no name of a model" in refused(path)


def test_shapes_unlike_the_configuration_are_said_in_words_of_our_own(saved):
    edit(saved / "config.json", vocab_size=50)
    assert "its weights have other shapes than its config.json says" in refused(saved)


def test_a_vision_language_checkpoint_speaks_as_its_text_part(tmp_path):
    text = {"vocab_size": 104, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    text |= {"sliding_window": 16, "query_pre_attn_scalar": 8, "eos_token_id": 0}
    seen = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "patch_size": 14}
    seen |= {"num_attention_heads": 2, "image_size": 28}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=seen, mm_tokens_per_image=4
    )
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    tiny.randomise(whole, seed=2).eval().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    ids = torch.tensor([[5, 40, 9, 70, 12]])
    with torch.no_grad():
        own = load_language_model(str(tmp_path), "fp32").module(ids).logits
        torch.testing.assert_close(own, whole(ids).logits, atol=1e-5, rtol=1e-4)


def test_weights_in_the_precision_of_their_file_are_read_where_they_lie(saved):
    """So the first of many processes holds no copy of a teacher that it sends to all."""
    file, maps = str((saved / "model.safetensors").resolve()), Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    for dtype, lies in ((torch.float32, True), (torch.bfloat16, False)):
        model = load_model(str(saved), dtype)
        assert (file in maps.read_text()) == lies, model.dtype
        del model
        gc.collect()
