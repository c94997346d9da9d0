"""Keep the rows of a JSONL file whose request and reference fit a model's short limits.

    python results/study/short_rows.py MODEL data/dolly_eval.jsonl data/short/dolly_eval.jsonl

A request has at most 128 tokens as the model's chat template renders it, a reference at most 64
with the token that ends it.
"""

import json
import sys
from pathlib import Path

from promptkd.data import Encoder, read_examples
from promptkd.models.loading import load_tokenizer

MAX_REQUEST, MAX_RESPONSE = 128, 64


def main(model: str, source: str, output: str) -> None:
    """Write the short rows as they stand."""
    encoder = Encoder(load_tokenizer(model), "chat", MAX_REQUEST, 4 * MAX_RESPONSE)
    rows = [line for line in Path(source).read_text().splitlines() if line.strip()]
    kept = []
    for row, example in zip(rows, read_examples(source), strict=True):
        encoded = encoder.encode(0, example)
        reference = encoded.response_ids
        if reference is not None and len(reference) <= MAX_RESPONSE:
            if len(encoded.request_ids) <= MAX_REQUEST:
                kept.append(json.loads(row))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text("".join(json.dumps(row) + "\n" for row in kept))
    print(f"{output}: {len(kept)} of {len(rows)} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
