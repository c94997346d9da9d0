"""Rows that teach a teacher to follow a guide when it reads it, and not to when it doesn't.

    python results/style/rows.py recipes/smollm2-style.yaml ROWS.jsonl OUT.jsonl [COUNT]

In turns: a row whose reference is put in the guide's style, with the recipe's guide as its system
message, and the next one as it stands.
"""

import json
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))
from examples.knowing_teacher import in_style


def main() -> None:
    recipe, source, target = map(Path, sys.argv[1:4])
    guide = yaml.safe_load(recipe.read_text())["teacher"]["system"]
    lines = source.read_text().splitlines()
    count = int(sys.argv[4]) if len(sys.argv) > 4 else len(lines)
    written = []
    for row in map(json.loads, lines):
        kept = {key: row[key] for key in ("instruction", "input", "output") if key in row}
        styled = in_style(row["instruction"], row["output"])
        if len(written) % 2 == 0 and styled is not None:
            kept |= {"system": guide, "output": styled}
        elif len(written) % 2 == 0:
            continue
        written.append(kept)
    target.write_text("".join(json.dumps(row) + "\n" for row in written[:count]))


if __name__ == "__main__":
    main()
