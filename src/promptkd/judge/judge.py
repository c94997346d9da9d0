"""A language model judges a run's responses, behind any OpenAI-compatible endpoint. Resumable.

Every reply is kept by content as it arrives, so that no question is asked twice after a stop, and
every reply that can't be used is counted and shown.
"""

import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing import TimeoutError
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from promptkd.bars import progress_bar
from promptkd.errors import UserError
from promptkd.evaluation.results import (
    Prediction,
    read_evaluation,
    read_predictions,
    refuse_partial,
)
from promptkd.evaluation.suites import PAPER_SEEDS, name_of
from promptkd.files import check_place, write_json, write_json_lines
from promptkd.judge.client import Endpoint, JudgeSettings, KeptReplies, RequestFailed, shortened
from promptkd.judge.protocols import (
    INSTRUCTIONS,
    MODEL_FIRST,
    ORDERS,
    Pair,
    read_grades,
    read_preference,
    summarise_grades,
    summarise_preferences,
)
from promptkd.records import Record
from promptkd.run import Place, lacks_of_run

READERS = {"score": read_grades, "pairwise": read_preference}
SUMMARIES = {"score": summarise_grades, "pairwise": summarise_preferences}
MAX_FAILURES_IN_A_ROW = 5
NUM_SHOWN = 5


@dataclass(frozen=True)
class Question:
    """What is asked about one response, and in which order the two replies are shown."""

    pair: Pair
    order: str
    text: str


@dataclass(frozen=True)
class Judgement:
    """What became of a question.

    Attributes:
        replies: the judge's texts; all but the last are malformed.
        verdict: the two grades, or the preferred position, of the last reply; None if unreadable.
        failure: why the server gave no reply, after all retries.
    """

    replies: tuple[str, ...]
    verdict: tuple[float, float] | str | None
    failure: RequestFailed | None
    num_asked: int

    @property
    def malformed(self) -> tuple[str, ...]:
        return self.replies if self.verdict is None else self.replies[:-1]


@dataclass(frozen=True)
class Selection:
    """Which responses are judged: of what data, which seeds (None: all), how many requests."""

    data: str
    seeds: Sequence[int] | None
    num_examples: int | None


class Judgements(Record):
    """What ``NAME.json`` holds of what the judge said."""

    def lines(self) -> Iterator[str]:
        """Counts, what failed, and the scores."""
        yield ", ".join(f"{name} {count}" for name, count in self["counts"].items())
        for reason, count in self["failures"].items():
            yield f"  failed {count}: {reason}"
        for example in self.malformed_examples:
            yield f"  malformed, seed {example['seed']} row {example['index']}: {example['reply']}"
        for name, score in (self["scores"] or {}).items():
            low, high = score.get("interval_95", (None, None))
            shown = f", 95% [{low:.2f}, {high:.2f}]" if low is not None else ""
            value = "–" if score["mean"] is None else f"{score['mean']:8.3f}"
            yield f"  {name:24} {value}{shown}"


def judge(
    run: Place,
    data: str,
    *,
    against: Place | None = None,
    seeds: Sequence[int] | None = None,
    num_examples: int | None = None,
    output: str | Path | None = None,
    **settings: Any,
) -> Judgements:
    """Let a language model judge a run's responses, and save its verdicts.

    Args:
        run: a run or its directory; responses that it lacks are generated first.
        data: the held-out requests, as given to ``evaluate``.
        against: another run to compare with pairwise; the references if not given.
        seeds: decoding seeds of the responses; all that were evaluated if not given.
        num_examples: only the first ones; ``output`` is a directory, ``RUN/judge`` by default.
        settings: the fields of ``JudgeSettings``; ``base_url`` and ``model`` are needed.

    Returns:
        What ``NAME.json`` holds (pairwise: ``NAME.against-OPPONENT.json``), NAME being the data's.
        Its counts: ``pairs`` of responses, of which ``judged`` have a verdict; replies ``asked``
        of the server in this call, ``cached`` ones, and ``malformed`` among both; questions that
        ``failed`` without a reply and are asked again by the same call.

    Raises:
        UserError: for bad input, or a server that can't be used; replies so far are kept.

    Source: PromptKD, arXiv:2402.12842, Appendix C, Table 6 (``score``; own wording).
    """
    asked = JudgeSettings(**settings)
    place, other = Path(run), None if against is None else Path(against)
    _check_asked(asked.protocol, place, other)
    endpoint, chosen = Endpoint(asked), Selection(data, seeds, num_examples)
    check_place(directory := Path(output or place / "judge"))
    rows = _predictions(place, chosen)
    questions = _questions(rows, _opponents(rows, place, other, chosen), asked.protocol)
    judgements = _judge_all(questions, endpoint, directory)
    opponent = "references" if other is None else str(other)
    result = {"model": str(place), "against": opponent, "data": data}
    result |= _record(asked, questions, judgements)
    name = name_of(data)
    if asked.protocol == "pairwise":
        name += f".against-{opponent if other is None else other.resolve().name}"
    replies = directory / f"{name}.replies.jsonl"
    write_json_lines(replies, (_row(q, judgements[q.text]) for q in questions))
    write_json(directory / f"{name}.json", result)
    return Judgements(result)


def _check_asked(protocol: str, run: Path, against: Path | None) -> None:
    for place in filter(None, (run, against)):
        if not place.is_dir():
            raise UserError(f"{place} is no run's directory: {lacks_of_run(place)}.")
    if protocol not in INSTRUCTIONS:
        raise UserError(f"The protocol is '{protocol}'; known: {', '.join(INSTRUCTIONS)}.")
    if against is not None and protocol == "score":
        raise UserError(
            "Protocol 'score' compares with the references only. Use 'pairwise' for another run."
        )


def _record(
    asked: JudgeSettings, questions: Sequence[Question], judgements: dict[str, Judgement]
) -> dict[str, Any]:
    """Who judged what, how it went, and what came of it."""
    verdicts = {(q.pair, q.order): judgements[q.text].verdict for q in questions}
    num_judged, scores = SUMMARIES[asked.protocol](verdicts)
    pairs, unique = {q.pair for q in questions}, list(judgements.values())
    malformed = [
        {"seed": q.pair[0], "index": q.pair[1], "order": q.order, "reply": shortened(reply, 500)}
        for q in questions
        for reply in judgements[q.text].malformed
    ]
    return {
        "protocol": asked.protocol,
        "judge": {
            "model": asked.model,
            "host": asked.host,
            "temperature": asked.temperature,
            "max_reply_tokens": asked.max_reply_tokens,
        },
        "order": list(ORDERS[asked.protocol]),
        "seeds": sorted({seed for seed, _ in pairs}),
        "num_examples": len({index for _, index in pairs}),
        "counts": {
            "pairs": len(pairs),
            "judged": num_judged,
            "asked": sum(j.num_asked for j in unique),
            "cached": sum(len(j.replies) - j.num_asked for j in unique),
            "malformed": sum(len(j.malformed) for j in unique),
            "failed": sum(j.failure is not None for j in unique),
        },
        "scores": scores,
        "failures": dict(Counter(str(j.failure) for j in unique if j.failure).most_common()),
        "malformed_examples": malformed[:NUM_SHOWN],
        "instruction": INSTRUCTIONS[asked.protocol],
    }


class FailureWatch:
    """When to give a server up: at a hopeless failure, or too many in a row."""

    def __init__(self) -> None:
        self.in_a_row: list[RequestFailed] = []
        self.given_up = False

    def note(self, failure: RequestFailed | None) -> None:
        """In the order in which questions end."""
        if not self.given_up:
            self.in_a_row = [*self.in_a_row, failure] if failure else []
            too_many = len(self.in_a_row) == MAX_FAILURES_IN_A_ROW
            self.given_up = failure is not None and (failure.hopeless or too_many)


def _judge_all(
    questions: Sequence[Question], endpoint: Endpoint, directory: Path
) -> dict[str, Judgement]:
    """Judgements by the question's text; equal texts are asked once.

    Raises:
        UserError: if the server can't be used at all; replies so far are kept.
    """
    texts = list(dict.fromkeys(question.text for question in questions))
    path, watch, noting = directory / "replies.sqlite", FailureWatch(), threading.Lock()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (
            endpoint.client,
            closing(KeptReplies(path)) as kept,
            progress_bar(total=len(texts), desc="judge", unit="question") as progress,
            # Its threads are daemons: who stops waits for no answer that is still to come.
            ThreadPool(endpoint.settings.max_concurrency) as pool,
        ):

            def ask(text: str) -> Judgement | None:
                """None if the server was given up."""
                if watch.given_up:
                    return None
                judgement = _ask(text, endpoint, kept)
                with noting:
                    watch.note(judgement.failure)
                    progress.update()
                return judgement

            asked = dict(zip(texts, _in_turn(pool.imap(ask, texts)), strict=True))
    except (sqlite3.Error, OSError) as error:
        raise UserError(
            f"The judge's replies can't be kept in {path} ({error}). "
            "Free some space, or remove that file if it is damaged."
        ) from None
    judgements = {text: judgement for text, judgement in asked.items() if judgement}
    num_replied = sum(j.failure is None for j in judgements.values())
    if watch.given_up or (watch.in_a_row and num_replied == 0):
        done = f"{num_replied} of {len(texts)} questions are done and kept in {directory}"
        raise _no_reply(endpoint, watch.in_a_row[-1], done)
    return judgements


def _in_turn(results: Any) -> Iterator[Any]:
    """Waits in short pieces: a signal that comes just before a wait doesn't end it."""
    while True:
        with suppress(TimeoutError):
            try:
                yield results.next(timeout=0.2)
            except StopIteration:
                return


def _no_reply(endpoint: Endpoint, failure: RequestFailed, done: str) -> UserError:
    remedy = "Check the server"
    if failure.hopeless:
        settings = endpoint.settings
        remedy = (
            f"Check the address, the model's name '{settings.model}' and the key in "
            f"{settings.api_key_variable}"
        )
    return UserError(
        f"The judge at {endpoint.host} gave no reply ({failure}). {remedy}, then give the same "
        f"command again: {done}."
    )


def _ask(text: str, endpoint: Endpoint, kept: KeptReplies) -> Judgement:
    """Ask until a reply can be read, each time with another judge seed."""
    read = READERS[endpoint.settings.protocol]
    replies, num_asked, verdict = [], 0, None
    for seed in range(1 + endpoint.settings.max_reasks):
        key = endpoint.key(text, seed)
        reply = kept.get(key)
        if reply is None:
            try:
                reply = endpoint.ask(text, seed)
            except RequestFailed as failure:
                return Judgement(tuple(replies), None, failure=failure, num_asked=num_asked)
            kept.put(key, reply)
            num_asked += 1
        replies.append(reply)
        verdict = read(reply)
        if verdict is not None:
            break
    return Judgement(tuple(replies), verdict, failure=None, num_asked=num_asked)


def _predictions(run: Path, chosen: Selection) -> dict[Pair, Prediction]:
    """The run's predictions by (seed, index), generated now if there are none."""
    data, seeds, num_examples = chosen.data, chosen.seeds, chosen.num_examples
    path = run / "evaluation" / f"{name_of(data)}.predictions.jsonl"
    if not path.is_file():
        if not (run / "recipe.yaml").is_file():
            raise UserError(
                f"{run} is no run's directory and has no {path.relative_to(run)}: "
                f"{lacks_of_run(run)}. Or generate a model's responses first: promptkd evaluate "
                f"MODEL --data {data} --output {path.parent}."
            )
        from promptkd.evaluation.evaluate import evaluate

        evaluate(run, data, seeds=seeds or PAPER_SEEDS, num_examples=num_examples)
    found, damaged = read_predictions(path)
    if damaged:
        raise UserError(
            f"{path}:{damaged[0]}: not a prediction. Remove the file; they are generated again."
        )
    if not found:
        raise UserError(f"{path} holds no responses. Remove the file; they are generated again.")
    if made := read_evaluation(path.with_name(f"{name_of(data)}.json")):
        refuse_partial(path.parent, made)
    rows = {(prediction.seed, prediction.index): prediction for prediction in found}
    missing = sorted(set(seeds or ()) - {seed for seed, _ in rows})
    if missing:
        raise UserError(
            f"{path} has no responses of the seeds {missing}, only of "
            f"{sorted({seed for seed, _ in rows})}. Judge those, or evaluate with --seeds first."
        )
    return {
        (seed, index): rows[seed, index]
        for seed, index in sorted(rows)
        if (seeds is None or seed in seeds) and (num_examples is None or index < num_examples)
    }


def _opponents(
    rows: dict[Pair, Prediction],
    run: str | Path,
    against: str | Path | None,
    chosen: Selection,
) -> dict[Pair, str]:
    """What each response is compared with: its first reference, or the other run's response."""
    if against is None:
        without = sorted({index for (_, index), row in rows.items() if not row.references})
        if without:
            raise UserError(
                f"{len(without)} requests of {chosen.data} have no reference (the first is row "
                f"{without[0]}). Bring references, or compare with another run: "
                "--protocol pairwise --against RUN."
            )
        return {pair: row.references[0] for pair, row in rows.items()}
    others = _predictions(Path(against), chosen)
    if others.keys() != rows.keys():
        raise UserError(
            f"{run} and {against} were not evaluated alike on {chosen.data}: {len(rows)} and "
            f"{len(others)} responses, {len(rows.keys() & others.keys())} of the same request and "
            "seed. Give --seeds and --num-examples that both have, or evaluate both alike."
        )
    if any(others[pair].references != row.references for pair, row in rows.items()):
        raise UserError(
            f"{run} and {against} answered different requests under the name "
            f"{name_of(chosen.data)}. Evaluate both on the same data."
        )
    return {pair: other.response for pair, other in others.items()}


def _questions(
    rows: dict[Pair, Prediction], opponents: dict[Pair, str], protocol: str
) -> list[Question]:
    questions = []
    for pair, row in rows.items():
        for order in ORDERS[protocol]:
            shown = (row.response, opponents[pair])
            first, second = shown if order == MODEL_FIRST else reversed(shown)
            text = INSTRUCTIONS[protocol].format(
                request=row.request.strip(), first=first, second=second
            )
            questions.append(Question(pair, order, text))
    return questions


def _row(question: Question, judgement: Judgement) -> dict[str, Any]:
    seed, index = question.pair
    return {
        "seed": seed,
        "index": index,
        "order": question.order,
        "replies": judgement.replies,
        "verdict": judgement.verdict,
        "failure": str(judgement.failure) if judgement.failure else None,
    }
