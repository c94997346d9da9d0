"""Who can generate in a run: the student, the teacher (its responses kept on disk), or both."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from promptkd.data import EncodedExample, Encoder, Example
from promptkd.generation.response_cache import ResponseCache, author_of
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import (
    CoGenerator,
    Engine,
    Response,
    TransformersEngine,
)
from promptkd.models.language_model import LanguageModel
from promptkd.models.loading import stop_ids
from promptkd.models.vocabularies import same_tokenizer
from promptkd.rollouts import Generators, Rollout


class Generation:
    """The student and, if a method asks for it, the plain teacher, ready to generate.

    Args:
        engine: the student's.
        student: the same student, for what is generated token by token together with the teacher.
        decoding: how tokens are chosen.
        seed: of the run; every response's own seed derives from it.
    """

    def __init__(
        self,
        engine: Engine,
        student: LanguageModel,
        decoding: GenerationSettings,
        encoder: Encoder,
        seed: int,
    ):
        self.engine = engine
        self.student = student
        self.decoding = decoding
        self.encoder = encoder
        self.seed = seed
        self._co_generator: LanguageModel | None = None
        self._teacher: OfflineGeneration | None = None

    def add_teacher(
        self, model: LanguageModel, tokenizer: Any, examples: Sequence[Example], encoder: Encoder
    ) -> None:
        """Let a teacher generate that is asked as ``encoder`` asks, by its own tokenizer."""
        self._co_generator = model
        own = encoder.with_tokenizer(tokenizer)
        self._teacher = OfflineGeneration(model, own, examples, generation=self)

    @cached_property
    def _together(self) -> TransformersEngine:
        """The engine in which two models can generate one response."""
        if isinstance(self.engine, TransformersEngine):
            return self.engine
        return TransformersEngine(self.student, self.engine.stop_ids.tolist())

    def of_step(self, step: int, max_steps: int, limit: int) -> Generators:
        """What the sources of one step (counted from 0) may ask for.

        Responses have at most ``limit`` tokens; the teacher's, which are kept, are cut there.
        """
        decoding = replace(self.decoding, max_new_tokens=limit)

        def rollouts(
            examples: Sequence[EncodedExample], responses: Sequence[Response], author: str
        ) -> list[Rollout]:
            return [
                Rollout.answer(e, r.token_ids, author, r.annotations())
                for e, r in zip(examples, responses, strict=True)
            ]

        def asked(examples: Sequence[EncodedExample]) -> tuple[Any, Any, GenerationSettings]:
            requests = [example.request_ids for example in examples]
            seeds = [(self.seed, step, example.index) for example in examples]
            return requests, seeds, decoding

        def by_student(examples: Sequence[EncodedExample]) -> list[Rollout]:
            return rollouts(examples, self.engine.generate(*asked(examples)), "student")

        def by_teacher(examples: Sequence[EncodedExample]) -> list[Rollout]:
            assert self._teacher is not None, "the method's source says asks_teacher"
            return [cut(rollout, limit) for rollout in self._teacher.generate(examples)]

        def by_both(examples: Sequence[EncodedExample], share: float) -> list[Rollout]:
            assert self._co_generator is not None, "the method's source says asks_teacher"
            reads = tuple(e.request_of(teacher=True) for e in examples)
            co_generator = CoGenerator(self._co_generator, share, reads)
            written = self._together.generate(*asked(examples), co_generator=co_generator)
            return rollouts(examples, written, "mixed")

        return Generators(
            student=by_student,
            teacher=by_teacher,
            mixed=by_both,
            progress=step / max_steps,
            seed=self.seed,
            step=step,
            encode=lambda text: tuple(self.encoder.tokenizer(text).input_ids),
        )


def cut(rollout: Rollout, limit: int) -> Rollout:
    """The first ``limit`` tokens of a response."""
    if len(rollout.response_ids) <= limit:
        return rollout
    return replace(rollout, response_ids=rollout.response_ids[:limit])


class OfflineGeneration:
    """Answers each request once, off-line; its tokens are kept on disk. Tokenizers may differ.

    What is kept is found by all that the teacher read: its context and system message too.
    """

    def __init__(
        self,
        model: LanguageModel,
        encoder: Encoder,
        examples: Sequence[Example],
        generation: Generation,
    ):
        tokenizer = encoder.tokenizer
        self.engine = TransformersEngine(model, stop_ids(tokenizer, model.module))
        self.tokenizer = tokenizer
        self.examples = examples
        stop = self.engine.stop_ids.tolist()
        self.cache = ResponseCache(author_of(model.module, model.dtype, stop))
        self.generation = generation
        self._shares_tokens = same_tokenizer(generation.encoder.tokenizer, tokenizer)
        self.encoder = encoder

    def generate(self, examples: Sequence[EncodedExample]) -> list[Rollout]:
        """From the cache, or generated now and kept."""
        decoding, seed = self.generation.decoding, self.generation.seed
        requests = [self.encoder.request_ids(self.examples[e.index]) for e in examples]
        keys = [self.cache.key(request, decoding.to_dict(), seed) for request in requests]
        missing = [i for i, key in enumerate(keys) if key not in self.cache]
        if missing:
            responses = self.engine.generate(
                [requests[i] for i in missing],
                [(seed, examples[i].index) for i in missing],
                decoding,
            )
            for i, response in zip(missing, responses, strict=True):
                self.cache.put(keys[i], response.token_ids)
        return [
            Rollout.answer(e, self._as_the_students(self.cache.get(key)), author="teacher")
            for e, key in zip(examples, keys, strict=True)
        ]

    def _as_the_students(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The same tokens if the tables are equal; else their text, read by the student's.

        A character that was cut in the middle has no text, so it is left out.
        """
        if self._shares_tokens:
            return ids
        ended = ids[-1] in self.engine.stop_ids.tolist()
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if not ended:
            text = text.rstrip("\ufffd")
        ids = self.generation.encoder.response_ids(text)
        if not ended and ids[-1] == self.generation.encoder.eos_token_id and len(ids) > 1:
            return ids[:-1]  # the teacher was cut: nobody said that the text ends here
        return ids
