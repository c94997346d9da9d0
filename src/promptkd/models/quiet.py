"""Without what transformers prints of every file that it reads or writes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

TABLE = "LOAD REPORT"
"""How transformers heads its table of missing and unexpected weights (``models.soundness``)."""


@contextmanager
def quietly() -> Iterator[None]:
    """Without bars for every file that transformers reads or writes, and its table of weights.

    Its warnings are heard.
    """
    loaders = logging.getLogger("transformers.modeling_utils")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    loaders.addFilter(_no_table)
    try:
        yield
    finally:
        loaders.removeFilter(_no_table)
        if bars:
            transformers_logging.enable_progress_bar()


def _no_table(record: logging.LogRecord) -> bool:
    return TABLE not in record.getMessage()
