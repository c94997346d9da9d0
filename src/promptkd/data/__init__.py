"""Reading what users bring, and handing out the requests of one optimizer step at a time. No torch.

At the border: files, folders, hub data sets and Python objects in the shapes that ``columns``
knows. Inside there are only requests and responses; token ids are lists of integers.
"""

from promptkd.data.batches import Batch, batch_of_step, steps_of_epochs
from promptkd.data.encoding import EncodedExample, Encoder, date_of_run, template_of_run
from promptkd.data.examples import Example, content_digest
from promptkd.data.overlap import Overlap, overlap, split_by_digest
from promptkd.data.reading import given_rows, read_examples, read_noted
from promptkd.data.sets import Dataset, evaluation_set, reads, training_set
from promptkd.data.template_findings import (
    TemplateFinding,
    template_difference,
    template_findings,
)
from promptkd.data.templates import ALPACA, adopt_chat_template, template_of

__all__ = [
    "ALPACA",
    "Batch",
    "Dataset",
    "EncodedExample",
    "Encoder",
    "Example",
    "Overlap",
    "TemplateFinding",
    "adopt_chat_template",
    "batch_of_step",
    "content_digest",
    "date_of_run",
    "evaluation_set",
    "given_rows",
    "overlap",
    "read_examples",
    "read_noted",
    "reads",
    "split_by_digest",
    "steps_of_epochs",
    "template_difference",
    "template_findings",
    "template_of",
    "template_of_run",
    "training_set",
]
