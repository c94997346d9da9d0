"""Writes reminders/: sentences that ask for a reminder, and the JSON record of each.

Held-out rows have people, things and places that no training row has, and no request that is
nearly equal to a training one. The same rows come out every time.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from promptkd.data import Example, overlap
from promptkd.files import write_json_lines

NUM_TRAINING, NUM_HELD_OUT = 560, 64
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
REQUESTS = (
    "Remind me to {task} on {day} at {time}.",
    "Please remind me to {task}, {day} at {time}.",
    "On {day} at {time} I have to {task}.",
    "Don't let me forget to {task} on {day} at {time}.",
    "I need to {task} at {time} on {day}.",
    "Can you remind me at {time} on {day} to {task}?",
    "Set a reminder for {day}, {time}: {task}.",
    "Note for {day}: {task} at {time}.",
    "At {time} on {day} I want to {task}.",
    "New reminder: {task}, {day}, {time}.",
    "{day}, {time}: {task}.",
    "I promised to {task} on {day} at {time}.",
)
TASKS = (
    "call {person}",
    "email {person} about the {thing}",
    "buy {food}",
    "buy {food} for {person}",
    "pick up the {thing}",
    "return the {thing} to {person}",
    "show {person} the {thing}",
    "meet {person} at the {place}",
    "drive {person} to the {place}",
    "clean the {place}",
    "cook {food} with {person}",
    "pack the {thing}",
)


@dataclass(frozen=True)
class Words:
    person: tuple[str, ...]
    thing: tuple[str, ...]
    food: tuple[str, ...]
    place: tuple[str, ...]


TRAINING = Words(
    person=(
        "Ann",
        "Ben",
        "Carla",
        "David",
        "Emma",
        "Frank",
        "Grace",
        "Henry",
        "Iris",
        "Jack",
        "Kate",
        "Leo",
        "Maria",
        "Nina",
        "Oscar",
        "Paul",
        "Rosa",
        "Sam",
        "Tina",
        "Victor",
        "Wendy",
        "Alan",
        "Julia",
        "Martin",
        "Sophie",
        "Peter",
        "Laura",
        "Simon",
        "Helen",
        "George",
    ),
    thing=(
        *("keys", "report", "camera", "tickets", "ladder", "guitar", "parcel", "passport"),
        *("laptop", "umbrella", "contract", "photos", "bicycle", "drill", "invoice", "suitcase"),
        *("blue jacket", "library books", "garden chairs", "train schedule", "tax form"),
        *("wedding gift", "old radio", "house plans", "phone charger"),
    ),
    food=(
        *("apples", "bread", "rice", "soup", "pancakes", "tomatoes", "cheese", "noodles"),
        *("green tea", "olive oil", "chicken curry", "orange juice", "roast beef", "carrots"),
    ),
    place=(
        *("station", "office", "kitchen", "garage", "museum", "library", "airport", "cafe"),
        *("swimming pool", "town hall", "basement", "city park", "school", "balcony"),
    ),
)
HELD_OUT = Words(
    person=(
        "Daniel",
        "Olivia",
        "Thomas",
        "Clara",
        "Robert",
        "Alice",
        "Edward",
        "Nora",
        "Philip",
        "Ruth",
    ),
    thing=("tent", "map", "printer", "red scarf", "bank letter", "violin", "rent receipt"),
    food=("potatoes", "salad", "mushrooms", "apple pie", "coffee"),
    place=("harbour", "theatre", "attic", "bus stop", "hospital"),
)


def row(words: Words, random: random.Random) -> dict[str, str]:
    """One request and its record."""
    chosen = {name: random.choice(getattr(words, name)) for name in Words.__annotations__}
    task = random.choice(TASKS).format(**chosen)
    day, hour, minute = random.choice(DAYS), random.randrange(7, 22), random.choice((0, 0, 30))
    clock = f"{(hour - 1) % 12 + 1}{':30' if minute else ''} {'am' if hour < 12 else 'pm'}"
    request = random.choice(REQUESTS).format(task=task, day=day, time=clock)
    record = {"task": task, "day": day, "time": clock}
    return {"request": request, "response": json.dumps(record)}


def rows(words: Words, number: int, seed: int) -> list[dict[str, str]]:
    """So many rows with different requests."""
    generator, found = random.Random(seed), {}
    while len(found) < number:
        made = row(words, generator)
        found[made["request"]] = made
    return list(found.values())


def main() -> None:
    """Write both files."""
    training, held_out = rows(TRAINING, NUM_TRAINING, 0), rows(HELD_OUT, 2 * NUM_HELD_OUT, 1)
    texts = [[Example(r["request"]) for r in part] for part in (training, held_out)]
    shared = overlap(texts[0], texts[1])
    apart = [r for i, r in enumerate(held_out) if i not in {*shared.exact, *shared.near}]
    for name, part in (("train", training), ("held_out", apart[:NUM_HELD_OUT])):
        write_json_lines(Path(__file__).parent / "reminders" / f"{name}.jsonl", part)


if __name__ == "__main__":
    main()
