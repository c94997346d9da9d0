"""Reading what users bring, and handing out the requests of one optimizer step at a time. No torch.

At the border: files, folders, hub data sets and Python objects in the shapes that ``columns``
knows. Inside there are only requests and responses; token ids are lists of integers.
"""

from promptkd.data.batches import Batch, batch_of_step, steps_of_epochs
from promptkd.data.encoding import (
    Dataset,
    EncodedExample,
    Encoder,
    evaluation_set,
    num_in_both,
    training_set,
)
from promptkd.data.examples import Example, content_digest
from promptkd.data.reading import read_examples, read_noted
from promptkd.data.templates import ALPACA, template_of

__all__ = [
    "ALPACA",
    "Batch",
    "Dataset",
    "EncodedExample",
    "Encoder",
    "Example",
    "batch_of_step",
    "content_digest",
    "evaluation_set",
    "num_in_both",
    "read_examples",
    "read_noted",
    "steps_of_epochs",
    "template_of",
    "training_set",
]
