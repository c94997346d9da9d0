"""What may choose the student that is kept, by name. No torch."""

CRITERIA = (
    "rouge_l",
    "rouge_l_unicode",
    "exact_match",
    "final_answer",
    "repeated_4_grams",
    "reverse_kl_to_teacher",
    "cross_entropy",
)
"""What may choose the student that is kept, beside a user's own function."""
SMALLER_IS_BETTER = frozenset({"repeated_4_grams", "reverse_kl_to_teacher", "cross_entropy"})
