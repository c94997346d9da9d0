"""The report of one run or of several: one page, its figures and tables as files. No torch.

Reads only what runs left in their directories, so it works for a run that is still going, was
stopped, or was made on another machine.
"""

from collections.abc import Sequence
from pathlib import Path

from promptkd.errors import UserError
from promptkd.files import write_text
from promptkd.report.data import data_sets, read_runs
from promptkd.report.page import render


def report(runs: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write OUTPUT/report.html, OUTPUT/figures and OUTPUT/tables.

    Args:
        runs: run directories; directories of scores that ``promptkd evaluate --output`` wrote for
            a teacher or for a student's start may stand among them.
        output: the run's own directory if there is one run and nothing is given.

    Returns:
        The page.

    Raises:
        UserError: if a path is no run, or several runs have no output.
    """
    paths = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    read, loose = read_runs(paths)
    if output is None and len(read) > 1:
        raise UserError(f"{len(read)} runs make one report: say where, with --output DIR.")
    directory = read[0].path if output is None else Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    html = render(read, data_sets(read, loose), directory)
    page = directory / "report.html"
    write_text(page, html)
    return page
