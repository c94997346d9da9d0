"""Causal language models: loading them, their two halves, and the tokens that two of them share."""

from promptkd.models.language_model import PADDING, Head, LanguageModel, select_responses
from promptkd.models.loading import load_language_model, load_model, load_tokenizer, stop_ids
from promptkd.models.vocabularies import shared_vocabulary

__all__ = [
    "PADDING",
    "Head",
    "LanguageModel",
    "load_language_model",
    "load_model",
    "load_tokenizer",
    "select_responses",
    "shared_vocabulary",
    "stop_ids",
]
