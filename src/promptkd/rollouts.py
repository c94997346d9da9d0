"""Where the responses that a step learns from come from: the data, the student, the teacher.

A rollout is one request with one response. A source makes the rollouts of one optimizer step,
once. Sources are frozen; what they must remember lives in a ``state`` dictionary that belongs to
the trainer and is saved with every checkpoint.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from promptkd.data import Batch, EncodedExample
from promptkd.errors import UserError

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Rollout:
    """A request and the response somebody wrote, as token ids.

    ``response_ids`` has at least one token and ends with a stop token unless it was cut.
    ``annotations`` holds one number per response token (old log-probabilities, for instance).
    ``teacher_request_ids`` is what stands before the same response where the teacher reads it;
    None: the same request.
    """

    index: int
    request_ids: Tokens
    response_ids: Tokens
    author: str
    annotations: dict[str, tuple[float, ...]] = field(default_factory=dict)
    teacher_request_ids: Tokens | None = None

    @classmethod
    def answer(
        cls,
        example: EncodedExample,
        response_ids: Tokens,
        author: str,
        annotations: dict[str, tuple[float, ...]] | None = None,
    ) -> "Rollout":
        """A response to an example, for both of its readers."""
        return cls(
            index=example.index,
            request_ids=example.request_ids,
            response_ids=response_ids,
            author=author,
            annotations=annotations or {},
            teacher_request_ids=example.teacher_request_ids,
        )

    @property
    def for_teacher(self) -> "Rollout":
        """As the teacher reads it."""
        if self.teacher_request_ids is None:
            return self
        return replace(self, request_ids=self.teacher_request_ids, teacher_request_ids=None)

    @property
    def num_tokens(self) -> int:
        """As the student reads it."""
        return len(self.request_ids) + len(self.response_ids)

    @property
    def longest(self) -> int:
        """Tokens for the one who reads more of them."""
        return max(self.num_tokens, self.for_teacher.num_tokens)


State = dict[str, Any]
"""What a source remembers, saved with every checkpoint."""
Generate = Callable[[Sequence[EncodedExample]], list[Rollout]]


@dataclass(frozen=True)
class Generators:
    """What a source may ask for during one optimizer step.

    Attributes:
        student: lets the current student write one response per request.
        teacher: the same for the plain teacher; its responses are kept and reused.
        mixed: tokens sampled from share x teacher + (1 - share) x student.
        progress: k / K, the fraction of training done before this step.
        seed: of the run.
        step: counted from 0.
        encode: text as the student's tokens, with its tokenizer's own start token.
    """

    student: Generate
    teacher: Generate
    mixed: Callable[[Sequence[EncodedExample], float], list[Rollout]]
    progress: float
    seed: int
    step: int
    encode: Callable[[str], Tokens]

    def chance(self, what: str, share: float, index: int = 0) -> bool:
        """A coin that depends on seed, step and example alone, not on ranks or history."""
        return self._random(what, index).random() < share

    def pick(self, what: str, number: int, index: int = 0) -> int:
        """A number below ``number``, drawn like ``chance``."""
        return self._random(what, index).randrange(number)

    def _random(self, what: str, index: int) -> random.Random:
        return random.Random(f"{what} {self.seed} {self.step} {index}")


@runtime_checkable
class Source(Protocol):
    """Who writes.

    Attributes:
        needs_references: whether every row must have a reference response.
        asks_teacher: whether the teacher generates (it then needs an engine).
        needs_validation: whether ``observe`` steers it, so that validation data must be there.
    """

    @property
    def needs_references(self) -> bool: ...

    @property
    def asks_teacher(self) -> bool: ...

    @property
    def needs_validation(self) -> bool: ...

    def asks_student(self, batch: Batch, generators: Generators, state: State) -> bool:
        """Whether ``generate``, given the same, will let the student write: then it is gathered."""
        ...

    def generate(self, batch: Batch, generators: Generators, state: State) -> list[Rollout]: ...

    def observe(self, validation_loss: float, state: dict[str, Any]) -> None:
        """Told after each evaluation: cross-entropy on references, nats per token."""
        ...


class Stateless:
    """A source that remembers nothing."""

    needs_references = False
    asks_teacher = False
    needs_validation = False

    def asks_student(self, batch: Batch, generators: Generators, state: State) -> bool:
        return True

    def observe(self, validation_loss: float, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Reference(Stateless):
    """The data's own responses."""

    needs_references = True

    def asks_student(self, batch: Batch, generators: Generators, state: State) -> bool:
        return False

    def generate(self, batch: Batch, generators: Generators, state: State) -> list[Rollout]:
        return reference_rollouts(batch.examples)


@dataclass(frozen=True)
class Student(Stateless):
    """The current student: on-policy."""

    def generate(self, batch: Batch, generators: Generators, state: State) -> list[Rollout]:
        return generators.student(batch.examples)


@dataclass(frozen=True)
class OfflineTeacher(Stateless):
    """The plain teacher, off-line: each request is answered once and the answer is kept."""

    asks_teacher = True

    def asks_student(self, batch: Batch, generators: Generators, state: State) -> bool:
        return False

    def generate(self, batch: Batch, generators: Generators, state: State) -> list[Rollout]:
        return generators.teacher(batch.examples)


@dataclass(frozen=True)
class Mixture(Stateless):
    """The student with probability ``student_share`` per request, else the data.

    The share goes linearly from ``student_share`` to ``final_share`` over training, if given.
    """

    student_share: float
    final_share: float | None = None

    needs_references = True

    def __post_init__(self) -> None:
        for share in (self.student_share, self.final_share):
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"student_share is {share}: a probability lies in [0, 1].")

    def share(self, progress: float) -> float:
        final = self.student_share if self.final_share is None else self.final_share
        return self.student_share + (final - self.student_share) * progress

    def asks_student(self, batch: Batch, generators: Generators, state: State) -> bool:
        return bool(self._by_student(batch, generators))

    def generate(self, batch: Batch, generators: Generators, state: State) -> list[Rollout]:
        by_student = self._by_student(batch, generators)
        chosen = {example.index for example in by_student}
        by_data = [example for example in batch.examples if example.index not in chosen]
        return [
            *(generators.student(by_student) if by_student else []),
            *reference_rollouts(by_data),
        ]

    def _by_student(self, batch: Batch, generators: Generators) -> list[EncodedExample]:
        share = self.share(generators.progress)
        return [e for e in batch.examples if generators.chance("mixture", share, e.index)]


@dataclass(frozen=True)
class TeacherMixed(Stateless):
    """Every token is drawn from p~ = share x teacher + (1 - share) x student.

    Each response is annotated with what a policy gradient needs, in nats, per token:

        sampling_logprobs  of y_t under the law that it was drawn from: p~ with the recipe's
                           temperature, top_p and top_k; w_t = q(y_t) / that
        advantages         what follows y_t: the mean over t' > t of log p(y_t') - log q(y_t')

    Source: MiniLLM, arXiv:2306.08543, section 2.2 (teacher-mixed sampling, length normalisation).
    """

    share: float = 0.2

    asks_teacher = True

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"teacher_share is {self.share}: it lies in [0, 1).")

    def generate(self, batch: Batch, generators: Generators, state: State) -> list[Rollout]:
        return [self._annotate(r) for r in generators.mixed(batch.examples, self.share)]

    def _annotate(self, rollout: Rollout) -> Rollout:
        student = rollout.annotations["student_logprobs"]
        teacher = rollout.annotations["teacher_logprobs"]
        rewards = [other - own for own, other in zip(student, teacher, strict=True)]
        notes = {
            "sampling_logprobs": rollout.annotations["sampling_logprobs"],
            "advantages": length_normalized_returns(rewards),
        }
        return replace(rollout, annotations=notes)


def length_normalized_returns(rewards: Sequence[float]) -> tuple[float, ...]:
    """For each token, the mean of the rewards after it; 0 for the last.

    Source: MiniLLM, arXiv:2306.08543, section 2.2, R_{t+1} / (T - t - 1).

    >>> length_normalized_returns([1.0, 2.0, 4.0])
    (3.0, 4.0, 0.0)
    """
    returns, later = [], 0.0
    for number, reward in enumerate(reversed(rewards)):
        returns.append(later / number if number else 0.0)
        later += reward
    return tuple(reversed(returns))


@dataclass(frozen=True)
class Corpus(Stateless):
    """Plain text, one passage a line: language modelling beside the requests.

    A passage's first token is its request, the rest its response.
    """

    path: str
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise ValueError(f"corpus {self.path} does not exist. Name a text file.")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens is {self.max_tokens}: a passage has at least two tokens.")
        _passages(self.path)  # what can't be read is refused here, not in the first step

    def asks_student(self, batch: Batch, generators: Generators, state: State) -> bool:
        return False

    def generate(self, batch: Batch, generators: Generators, state: State) -> list[Rollout]:
        passages, rollouts = _passages(self.path), []
        for example in batch.examples:
            text = passages[generators.pick("corpus", len(passages), example.index)]
            tokens = generators.encode(text)[: self.max_tokens]
            rollouts.append(Rollout(example.index, tokens[:1], tokens[1:], author="corpus"))
        return rollouts


@cache
def _passages(path: str) -> list[str]:
    """The lines of at least two words: two words are two tokens to any tokenizer."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"The corpus {path} is not UTF-8 text ({error}). Convert it.") from None
    passages = [line for line in lines if len(line.split()) > 1]
    if not passages:
        raise UserError(f"The corpus {path} has no line of two words or more.")
    return passages


def reference_rollouts(examples: Iterable[EncodedExample]) -> list[Rollout]:
    rollouts = []
    for example in examples:
        assert example.response_ids is not None, "refused when the recipe was read"
        rollouts.append(Rollout.answer(example, example.response_ids, author="reference"))
    return rollouts
