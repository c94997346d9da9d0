"""Every command on a place that isn't what it asks for: a sentence that says what stands there."""

from pathlib import Path

import pytest
import yaml

import tiny
from promptkd.cli import main

VERBS = {
    "generate": "generate PLACE Hi",
    "evaluate": "evaluate PLACE --data d.jsonl",
    "evaluate --with": "evaluate PLACE --with start --data d.jsonl",
    "exposure-bias": "exposure-bias PLACE",
    "analyse-prompt": "analyse-prompt PLACE",
    "judge": "judge PLACE --data d.jsonl --base-url http://localhost:1/v1 --model m",
    "report": "report PLACE",
    "rescore": "rescore PLACE",
    "compare": "compare PLACE PLACE",
}
PLACES = {
    "absent": "does not exist",
    "file": "is a file",
    "empty": "it has no recipe.yaml. Name a directory that was made by promptkd train",
    "foreign": "its recipe.yaml is none of promptkd's: 'student' is missing",
    "planned": "it has no student/ yet, only a recipe: it hasn't begun. Begin it: promptkd train",
    "unfinished": "it has no student/ yet. Let its training finish: promptkd train",
    "emptied": "its student/ was emptied or removed. Put a copy of it back, or train it again",
    "study": "holds 2 runs, such as PLACE/kd/seed-0. Name that",
    "whole-path": "holds the run PLACE/kd. Name that",
    "run/notes": "it is a part of the run PARENT. Name that",
    "model": "it is a model (config.json), and no run was made here",
}
OTHER_WORDS = {
    ("compare", "absent"): "is no directory. Name a run",
    ("compare", "file"): "is no directory. Name a run",
    ("evaluate --with", "foreign"): "'student' is missing from the recipe",
    ("report", "whole-path"): "hasn't come to its student yet. Give the same promptkd distill",
    **{("evaluate --with", place): "" for place in ("unfinished", "emptied")},
}
"""Of commands that say it otherwise; those that measure nothing have a sentence of their own."""
UNTOUCHED = {("report", "unfinished"), ("report", "emptied")}
"""What has begun can be reported."""


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("places")
    for name in PLACES:
        if name not in ("absent", "file"):
            (root / name).mkdir(parents=True)
    (root / "file").write_text("x")
    recipe = yaml.safe_dump(tiny.recipe(root))
    runs = ("unfinished", "emptied", "study/kd/seed-0", "study/kd/seed-1", "whole-path/kd", "run")
    for name in ("planned", *runs):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "recipe.yaml").write_text(recipe)
    for name in runs:
        (root / name / "environment.json").write_text("{}")
    (root / "emptied" / "student").mkdir()
    (root / "foreign" / "recipe.yaml").write_text("ingredients: [eggs]\noutput: cake\n")
    (root / "whole-path" / "order.json").write_text("{}")
    (root / "model" / "config.json").write_text("{}")
    return root


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("verb", VERBS)
def test_a_place_that_is_something_else_is_named_for_what_it_is(places, capfd, verb, place):
    if (verb, place) in UNTOUCHED:
        return
    words = [word.replace("PLACE", str(places / place)) for word in VERBS[verb].split()]
    with pytest.raises(SystemExit) as ended:
        main(words)
    sentence = capfd.readouterr().err
    assert ended.value.code == 1, sentence
    assert "Traceback" not in sentence
    expected = PLACES[place] if verb not in ("rescore", "compare") else ""
    expected = OTHER_WORDS.get((verb, place), expected)
    expected = expected.replace("PLACE", str(places / place))
    assert expected.replace("PARENT", str((places / place).parent)) in sentence
    assert str(places / place) in sentence
