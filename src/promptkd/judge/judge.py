"""A language model judges the responses of a run, over any OpenAI-compatible endpoint. No torch.

Every reply is kept by content as it arrives, so a judge that was stopped goes on without asking
twice, and every reply that can't be used is counted and shown.
"""

import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from promptkd.errors import UserError
from promptkd.evaluation.results import Prediction, read_predictions
from promptkd.evaluation.suites import PAPER_SEEDS, name_of
from promptkd.files import write_text
from promptkd.judge.client import Endpoint, KeptReplies, RequestFailed, shortened
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


def judge(
    run: str | Path,
    data: str,
    *,
    base_url: str,
    model: str,
    protocol: str = "score",
    against: str | Path | None = None,
    seeds: Sequence[int] | None = None,
    num_examples: int | None = None,
    temperature: float = 0.7,  # the paper's judge, Table 6
    max_reply_tokens: int = 1024,
    max_reasks: int = 2,
    max_concurrency: int = 4,
    timeout: float = 60.0,
    max_retries: int = 4,
    api_key_variable: str = "OPENAI_API_KEY",
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Let a language model judge a run's responses, and save its verdicts.

    ``score``: 100 * sum of the model's grades / sum of the references' grades, from 1 to 10 each,
    the model always shown first. ``pairwise``: every pair is shown in both orders; a win or loss
    counts only if both orders agree, everything else is a tie; win rate = wins + ties / 2.

    Args:
        run: a run's directory; responses that it lacks are written first.
        data: the held-out requests, as given to ``evaluate``.
        base_url: of an OpenAI-compatible endpoint, up to and with ``/v1``.
        model: the judge's name there.
        against: another run to compare with pairwise; the references if not given.
        seeds: decoding seeds of the responses; all that were evaluated if not given.
        num_examples: only the first ones.
        temperature: the judge's.
        max_reasks: how often a malformed reply is asked for again, with another judge seed.
        timeout: seconds for one answer.
        max_retries: per question, after a timeout, a lost connection or status 408, 409, 429, 5xx.
        api_key_variable: environment variable with the key; none is sent if it isn't set.
        output: directory; ``RUN/judge`` by default.

    Returns:
        What ``NAME.json`` holds (pairwise: ``NAME.against-OPPONENT.json``), NAME being the data's.
        Its counts: ``pairs`` of responses, of which ``judged`` have a verdict; replies ``asked``
        of the server in this call, ``cached`` ones, and ``malformed`` among both; questions that
        ``failed`` without a reply and are asked again by the same call.

    Raises:
        UserError: for bad input, or a server that can't be used; replies so far are kept.

    Source: PromptKD, arXiv:2402.12842, Appendix C, Table 6 (``score``; own wording).
    """
    if protocol not in INSTRUCTIONS:
        raise UserError(f"The protocol is '{protocol}'; known: {', '.join(INSTRUCTIONS)}.")
    if against is not None and protocol == "score":
        raise UserError(
            "Protocol 'score' compares with the references only. "
            "To compare with another run, use the protocol 'pairwise'."
        )
    endpoint = Endpoint(
        base_url,
        model,
        temperature=temperature,
        max_reply_tokens=max_reply_tokens,
        timeout=timeout,
        max_retries=max_retries,
        api_key_variable=api_key_variable,
    )
    rows = _predictions(Path(run), data, seeds, num_examples)
    opponents = _opponents(rows, run, against, data, seeds, num_examples)
    questions = _questions(rows, opponents, protocol)
    directory = Path(output or Path(run) / "judge")
    judgements = _judge_all(questions, endpoint, protocol, directory, max_reasks, max_concurrency)
    verdicts = {(q.pair, q.order): judgements[q.text].verdict for q in questions}
    summarise = {"score": summarise_grades, "pairwise": summarise_preferences}[protocol]
    num_judged, scores = summarise(verdicts)
    unique = list(judgements.values())
    malformed = [
        {"seed": q.pair[0], "index": q.pair[1], "order": q.order, "reply": shortened(reply, 500)}
        for q in questions
        for reply in judgements[q.text].malformed
    ]
    result = {
        "protocol": protocol,
        "model": str(run),
        "against": "references" if against is None else str(against),
        "data": data,
        "judge": {
            "model": model,
            "host": endpoint.host,
            "temperature": temperature,
            "max_reply_tokens": max_reply_tokens,
        },
        "order": list(ORDERS[protocol]),
        "seeds": sorted({seed for seed, _ in rows}),
        "num_examples": len({index for _, index in rows}),
        "counts": {
            "pairs": len(rows),
            "judged": num_judged,
            "asked": sum(j.num_asked for j in unique),
            "cached": sum(len(j.replies) - j.num_asked for j in unique),
            "malformed": sum(len(j.malformed) for j in unique),
            "failed": sum(j.failure is not None for j in unique),
        },
        "scores": scores,
        "failures": dict(Counter(str(j.failure) for j in unique if j.failure).most_common()),
        "malformed_examples": malformed[:NUM_SHOWN],
        "instruction": INSTRUCTIONS[protocol],
    }
    name = name_of(data)
    if protocol == "pairwise":
        name += f".against-{'references' if against is None else Path(against).resolve().name}"
    lines = [json.dumps(_row(q, judgements[q.text]), ensure_ascii=False) + "\n" for q in questions]
    write_text(directory / f"{name}.replies.jsonl", "".join(lines))
    write_text(directory / f"{name}.json", json.dumps(result, indent=2, ensure_ascii=False))
    return result


def _judge_all(
    questions: Sequence[Question],
    endpoint: Endpoint,
    protocol: str,
    directory: Path,
    max_reasks: int,
    max_concurrency: int,
) -> dict[str, Judgement]:
    """Judgements by the question's text; equal texts are asked once.

    Raises:
        UserError: if the server can't be used at all; replies so far are kept.
    """
    texts = list(dict.fromkeys(question.text for question in questions))
    read = {"score": read_grades, "pairwise": read_preference}[protocol]
    path = directory / "replies.sqlite"
    failures: list[RequestFailed] = []
    gone, counting = threading.Event(), threading.Lock()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (
            endpoint.client,
            closing(KeptReplies(path)) as kept,
            tqdm(total=len(texts), desc="judge", unit="question") as progress,
            ThreadPoolExecutor(max_concurrency) as pool,
        ):

            def ask(text: str) -> Judgement | None:
                """None if the server was given up; failures count in the order they happen."""
                if gone.is_set():
                    return None
                judgement = _ask(text, endpoint, kept, read, max_reasks)
                with counting:
                    failure = judgement.failure
                    if not gone.is_set():
                        failures[:] = [*failures, failure] if failure else []
                        if failure and (failure.hopeless or len(failures) == MAX_FAILURES_IN_A_ROW):
                            gone.set()
                    progress.update()
                return judgement

            asked = dict(zip(texts, pool.map(ask, texts), strict=True))
    except (sqlite3.Error, OSError) as error:
        raise UserError(
            f"The judge's replies can't be kept in {path} ({error}). "
            "Free some space, or remove that file if it is damaged."
        ) from None
    judgements = {text: judgement for text, judgement in asked.items() if judgement}
    num_replied = sum(j.failure is None for j in judgements.values())
    if gone.is_set() or (failures and num_replied == 0):
        remedy = (
            f"Check the address, the model's name '{endpoint.model}' and the key in "
            f"{endpoint.api_key_variable}"
            if failures[-1].hopeless
            else "Check the server"
        )
        raise UserError(
            f"The judge at {endpoint.host} gave no reply ({failures[-1]}). {remedy}, then give "
            f"the same command again: {num_replied} of {len(texts)} questions are done and kept "
            f"in {directory}."
        )
    return judgements


def _ask(
    text: str,
    endpoint: Endpoint,
    kept: KeptReplies,
    read: Callable[[str], tuple[float, float] | str | None],
    max_reasks: int,
) -> Judgement:
    """Ask until a reply can be read, each time with another judge seed."""
    replies, num_asked, verdict = [], 0, None
    for seed in range(1 + max_reasks):
        key = endpoint.key(text, seed)
        reply = kept.get(key)
        if reply is None:
            try:
                reply = endpoint.ask(text, seed)
            except RequestFailed as failure:
                return Judgement(tuple(replies), None, failure, num_asked)
            kept.put(key, reply)
            num_asked += 1
        replies.append(reply)
        verdict = read(reply)
        if verdict is not None:
            break
    return Judgement(tuple(replies), verdict, None, num_asked)


def _predictions(
    run: Path, data: str, seeds: Sequence[int] | None, num_examples: int | None
) -> dict[Pair, Prediction]:
    """The run's predictions by (seed, index), written now if there are none."""
    path = run / "evaluation" / f"{name_of(data)}.predictions.jsonl"
    if not path.is_file():
        if not (run / "recipe.yaml").is_file():
            raise UserError(
                f"{run} is no run's directory and has no {path.relative_to(run)}. "
                f"Give a run, or write its responses first: promptkd evaluate MODEL --data {data} "
                f"--output {path.parent}."
            )
        from promptkd.evaluation.evaluate import evaluate

        evaluate(run, data, seeds=seeds or PAPER_SEEDS, num_examples=num_examples)
    found, damaged = read_predictions(path)
    if damaged:
        raise UserError(
            f"{path}:{damaged[0]}: not a prediction. Remove the file; it is written again."
        )
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
    data: str,
    seeds: Sequence[int] | None,
    num_examples: int | None,
) -> dict[Pair, str]:
    """What each response is compared with: its first reference, or the other run's response."""
    if against is None:
        without = sorted({index for (_, index), row in rows.items() if not row.references})
        if without:
            raise UserError(
                f"{len(without)} requests of {data} have no reference (the first is row "
                f"{without[0]}). Bring references, or compare with another run: "
                "--protocol pairwise --against RUN."
            )
        return {pair: row.references[0] for pair, row in rows.items()}
    others = _predictions(Path(against), data, seeds, num_examples)
    if others.keys() != rows.keys():
        raise UserError(
            f"{run} and {against} were not evaluated alike on {data}: {len(rows)} and "
            f"{len(others)} responses, {len(rows.keys() & others.keys())} of the same request and "
            "seed. Give --seeds and --num-examples that both have, or evaluate both alike."
        )
    if any(others[pair].references != row.references for pair, row in rows.items()):
        raise UserError(
            f"{run} and {against} answered different requests under the name "
            f"{name_of(data)}. Evaluate both on the same data."
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
