"""What the code promises about itself: where files are written, and how long a file may be."""

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "promptkd"
WRITING = re.compile(r"""\.write_text\(|\.write_bytes\(|open\([^)]*["'][wax]b?["']|os\.replace\(""")
ELSEWHERE = {"files.py", "training/checkpoints.py"}
"""torch writes tensors itself, into a directory that ``files`` renames when it is whole."""


def test_every_file_is_written_by_one_module():
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if WRITING.search(path.read_text())
    }
    assert found == ELSEWHERE
