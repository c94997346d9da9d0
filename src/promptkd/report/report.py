"""Writing the report of one run or of several. No torch.

Reads only what runs left in their directories, so it works for a run that is still going, was
stopped, or was made on another machine.
"""

from collections.abc import Sequence
from pathlib import Path

from promptkd.errors import UserError
from promptkd.files import write_text
from promptkd.report.page import render
from promptkd.report.places import read_subject


def report(runs: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write OUTPUT/report.html, OUTPUT/figures and OUTPUT/tables.

    Args:
        runs: a run's directory or several, of a whole path, or of a study. Directories of scores
            that ``promptkd evaluate --output`` wrote for a teacher or for a student's start may
            stand among runs.
        output: the directory itself if one is named and nothing is given.

    Returns:
        The page.

    Raises:
        UserError: if a path is none of these, or several have no output.
    """
    paths = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    subject = read_subject(paths)
    if output is None and len(paths) > 1:
        raise UserError(f"{len(paths)} places make one report: say where, with --output DIR.")
    directory = paths[0] if output is None else Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    html = render(subject, directory)
    page = directory / "report.html"
    write_text(page, html)
    return page
