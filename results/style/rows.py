"""Rows that teach a teacher to follow a guide when it reads it, and not to when it doesn't.

    python results/style/rows.py recipes/smollm2-style.yaml ROWS.jsonl OUT.jsonl [ROWS]

Rows whose reference follows the style get the recipe's guide as their system message; of the
others as many stand as they are. The first so many of both, in the order of the file.
"""

import json
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))
from examples.knowing_teacher import follows_style


def main() -> None:
    recipe, source, target = map(Path, sys.argv[1:4])
    guide = yaml.safe_load(recipe.read_text())["teacher"]["system"]
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    styled, other = [], []
    for row in rows:
        asked = {"request": f"{row['instruction']}\n{row.get('input', '')}"}
        kept = {key: row[key] for key in ("instruction", "input", "output") if key in row}
        if follows_style(row["output"], (), asked):
            styled.append({**kept, "system": guide})
        else:
            other.append(kept)
    count = min(len(styled), len(other), int(sys.argv[4]) // 2 if len(sys.argv) > 4 else len(rows))
    pairs = zip(styled[:count], other[:count], strict=True)
    target.write_text("".join(json.dumps(row) + "\n" for pair in pairs for row in pair))


if __name__ == "__main__":
    main()
