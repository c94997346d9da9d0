"""Families people distil: padding, packing, generation and prompts are exact on each of them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from promptkd.errors import UserError
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.models.language_model import PADDING, prompt_positions
from promptkd.models.loading import load_model
from promptkd.teachers import prompt_vectors

IDS = {"vocab_size": tiny.ROWS, "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
OLD = IDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BASE = OLD | {
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LINEAR = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
CONFIGS = {
    "gpt_neox": OLD | {"intermediate_size": 64, "max_position_embeddings": 512},
    "phi": BASE | {"num_key_value_heads": 4},
    "phi3": BASE | {"sliding_window": None},
    "falcon": OLD | {"alibi": False, "new_decoder_architecture": False, "multi_query": True},
    "falcon (ALiBi)": OLD | {"alibi": True, "multi_query": False, "parallel_attn": False},
    "bloom": IDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": IDS | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "gptj": IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 512},
    "mistral (window)": BASE | {"sliding_window": 6},
    "gemma3_text": BASE | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "mixtral": BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": BASE | MOE | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "qwen3_moe": BASE | MOE | {"head_dim": 8, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "gpt_oss": BASE
    | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "deepseek_v3": BASE | LATENT,
    "cohere": BASE | {"logit_scale": 0.25},
    "granite": BASE | {"logits_scaling": 4.0, "attention_multiplier": 0.2},
    "stablelm": BASE | {"num_key_value_heads": 4},
    "starcoder2": BASE | {"sliding_window": None},
    "olmo2": BASE,
    "smollm3": BASE | {"no_rope_layers": [1, 0]},
    "nemotron": BASE,
    "lfm2": BASE | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "qwen3_5_text": BASE | LINEAR,
}
REQUESTS = [(5, 9, 30, 41, 7, 66, 12, 20, 8), (50, 51), (22, 90, 14, 61, 33)]


def plain(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split(" ")[0], **CONFIGS[family])
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return tiny.randomise(module, seed=0).eval()


def language_model(family):
    return tiny.language_model(plain(family))


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_states_of_a_row_do_not_depend_on_its_neighbours(family, prompted):
    model = language_model(family)
    prompt = prompt_vectors(model, [40, 11, 70]) if prompted else None
    tokens = torch.full((3, 9), PADDING)
    for row, request in zip(tokens, REQUESTS, strict=True):
        row[: len(request)] = torch.tensor(request)
    with torch.no_grad():
        together = model.hidden_states(tokens, prompt)
        for row, request in zip(together, REQUESTS, strict=True):
            alone = model.hidden_states(torch.tensor([request]), prompt)[0]
            torch.testing.assert_close(row[: len(request)], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_response_generated_in_a_batch_is_the_one_generated_alone(family, prompted):
    model = language_model(family)
    prompt = prompt_vectors(model, [40, 11, 70]) if prompted else None
    settings, seeds = GenerationSettings(12, temperature=1.5), [(0,), (1,), (2,)]
    first = TransformersEngine(model, (0,)).generate(REQUESTS, seeds, settings, soft_prompt=prompt)
    # A token that ends one response early, so that rows end at different times.
    engine = TransformersEngine(model, (0, first[0].token_ids[2], first[1].token_ids[4]))
    together = engine.generate(REQUESTS, seeds, settings, soft_prompt=prompt)
    for request, seed, response in zip(REQUESTS, seeds, together, strict=True):
        assert engine.generate([request], [seed], settings, soft_prompt=prompt) == [response]


def test_a_prompt_lies_between_padding_and_text():
    real = torch.tensor([[False, False, True], [True, True, True], [True, False, False]])
    of_prompt, all_real = prompt_positions(real, 2)
    assert of_prompt.int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert all_real.int().tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_a_model_without_a_cache_of_transformers_is_refused_when_it_is_loaded(tmp_path):
    config = AutoConfig.for_model("mamba", **IDS, hidden_size=32, state_size=8, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"\(MambaForCausalLM\).*can't generate with it"):
        load_model(str(tmp_path), torch.float32)
