"""A finished run's models, loaded to be measured, and what they say about given responses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from promptkd.config import Recipe
from promptkd.data import (
    Dataset,
    Encoder,
    Example,
    date_of_run,
    evaluation_set,
    given_rows,
    read_examples,
    reads,
    template_of_run,
)
from promptkd.errors import UserError
from promptkd.generation.sampling import GenerationSettings
from promptkd.models.frozen import Storage
from promptkd.models.language_model import LanguageModel
from promptkd.models.loading import (
    check_context,
    load_tokenizer,
    stop_ids,
)
from promptkd.models.vocabularies import load_pair
from promptkd.run import Place, TrainedRun

TEACHER_LIMIT = "the longest of the teacher's requests (teacher.max_request_tokens)"


@dataclass(frozen=True)
class FinishedRun:
    """A student, its plain teacher, and how the run asked them.

    Attributes:
        encoder: the run's template and limits, with the student's tokenizer.
        teacher_encoder: how the teacher is asked; None where as the student is.
        stop: every token that ends a response for either model: both are cut alike.
    """

    directory: Path
    recipe: Recipe
    tokenizer: Any
    encoder: Encoder
    teacher_encoder: Encoder | None
    student: LanguageModel
    teacher: LanguageModel
    teacher_name: str
    stop: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return str(self.student.dtype).removeprefix("torch.")

    def protocol(self, decoding: GenerationSettings) -> dict[str, Any]:
        """How the models were asked, as results record it."""
        return {
            "run": str(self.directory),
            "teacher": self.teacher_name,
            "template": self.encoder.template,
            "max_request_tokens": self.encoder.max_request_tokens,
            "decoding": decoding.to_dict(),
            "dtype": self.dtype,
        }

    def read(self, sources: Sequence[str]) -> list[Example]:
        """Rows by the run's columns.

        Raises:
            UserError: if they can't be read, or no row has what the teacher reads in the run.
        """
        section = self.recipe.teacher
        context = section.context if section else None
        examples = read_examples(list(sources), self.recipe.data.columns, context)
        if not reads(examples, context):
            raise UserError(
                f"{', '.join(sources)}: no row has the column '{context}', which this run's "
                "teacher reads (teacher.context). Bring data that has it."
            )
        return examples

    def held_out(self, data: Any) -> list[str]:
        """The names of held-out data; the run's validation data where none are given."""
        return list(self.recipe.data.validation if data is None else given_rows(data, "data"))

    def evaluation_set(self, sources: Sequence[str], num_examples: int | None) -> Dataset:
        """The first rows of held-out data, as the run's models are asked them."""
        examples = self.read(sources)[:num_examples]
        data = evaluation_set(examples, self.encoder, self.teacher_encoder)
        lengths = data.longest_teacher_request, self.encoder.max_response_tokens
        check_context(self.teacher.module.config, *lengths, self.teacher_name, limit=TEACHER_LIMIT)
        return data

    def decoding(self, no_repeat_ngram_size: int = 0) -> GenerationSettings:
        """The run's own: as it sampled in training and validation, where nothing is blocked."""
        return replace(
            GenerationSettings.of_recipe(self.recipe),
            max_new_tokens=self.encoder.max_response_tokens,
            no_repeat_ngram_size=no_repeat_ngram_size,
        )


def load_run(
    run: Place, what: str, *, precision: str = "fp32", max_new_tokens: int | None = None
) -> FinishedRun:
    """Load student and teacher of a run over their shared vocabulary.

    Args:
        run: itself or its directory.
        what: what they are needed for, for the error messages.
        precision: auto | bf16 | fp32.
        max_new_tokens: of a response; the run's own if not given.

    Raises:
        UserError: if the run is not finished, has no teacher or two tokenizers, or if requests and
            responses don't fit into a context.
    """
    directory = Path(run)
    recipe = TrainedRun.finished(run).recipe
    if recipe.teacher is None:
        raise UserError(
            f"{directory} has no teacher (method '{recipe.method.name}'), and {what} compares the "
            "student with one. Add 'teacher: {model: ...}' to its recipe."
        )
    tokenizer = load_tokenizer(str(directory))
    name_of_teacher = recipe.teacher_model(directory)
    storage = Storage(recipe.teacher.quantization, recipe.teacher.offload)
    student, teacher = load_pair(str(directory), name_of_teacher, tokenizer, precision, storage)
    assert teacher is not None, "there is one"
    asked: Any = {"date": date_of_run(directory), "max_response_tokens": max_new_tokens}
    template = template_of_run(directory, recipe.data.template)
    encoder = Encoder.of_recipe(recipe, tokenizer, template=template, **asked)
    for model, name in ((student, f"{directory}"), (teacher, name_of_teacher)):
        lengths = encoder.max_request_tokens, encoder.max_response_tokens
        check_context(model.module.config, *lengths, name)
    ends = [stop_ids(tokenizer, model.module) for model in (student, teacher)]
    return FinishedRun(
        directory=directory,
        recipe=recipe,
        tokenizer=tokenizer,
        encoder=encoder,
        teacher_encoder=encoder.for_teacher(recipe.teacher, load_tokenizer(name_of_teacher)),
        student=student,
        teacher=teacher,
        teacher_name=name_of_teacher,
        stop=tuple(sorted({encoder.eos_token_id, *ends[0], *ends[1]})),
    )
