"""What a run asks: the data of a recipe in tokens, for the student and for its teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from promptkd.composition import Method
from promptkd.config import Recipe
from promptkd.data import (
    Dataset,
    Encoder,
    Example,
    adopt_chat_template,
    date_of_run,
    evaluation_set,
    overlap,
    read_noted,
    reads,
    template_difference,
    template_findings,
    training_set,
)
from promptkd.errors import UserError
from promptkd.findings import Finding
from promptkd.models.loading import load_tokenizer
from promptkd.models.settings import spelling
from promptkd.models.vocabularies import same_tokenizer
from promptkd.training import preflight
from promptkd.training.identity import Contents

Say = Callable[[str], None]


@dataclass(frozen=True)
class Requests:
    """What a run asks: the tokenizer of its student, and its data in tokens.

    Attributes:
        teacher_encoder: how the teacher is asked; None where as the student is.
        validates_teacher: whether the validation data have what the teacher reads.
    """

    tokenizer: Any
    encoder: Encoder
    teacher_encoder: Encoder | None
    validates_teacher: bool
    examples: list[Example]
    data: Dataset
    validation: Dataset | None

    def say(self, say: Say) -> None:
        """What was read, cut and dropped."""
        say(f"training data: {self.data.summary()}")
        if self.validation:
            say(f"validation data: {self.validation.summary()}")

    def contents(self) -> Contents:
        """Of the data as the run reads them, and of what makes text of its answers."""
        contents: Contents = {
            "training requests": self.data.digest(),
            "student tokenizer": spelling(self.tokenizer),
        }
        if self.validation:
            contents["validation requests"] = self.validation.digest()
            contents["validation references"] = self.validation.digest_of_references()
        return contents

    @property
    def longest_row(self) -> int:
        """Tokens of the longest request that either model may read, with its response."""
        longest = max(self.encoder.max_request_tokens, self.data.longest_teacher_request)
        return longest + self.encoder.max_response_tokens


def read_requests(recipe: Recipe, method: Method, say: Say) -> Requests:
    """Read, encode and check the data.

    Raises:
        UserError: for rows, templates and columns that can't be used.
    """
    tokenizer = load_tokenizer(recipe.student.model)
    encoder, teacher_encoder = _encoders(recipe, tokenizer, say)
    columns, context = recipe.data.columns, recipe.teacher and recipe.teacher.context
    examples, notes = read_noted(recipe.data.train, columns, context)
    if not reads(examples, context):
        raise UserError(
            f"teacher.context names the column '{context}', but no row of data.train has it. "
            "Correct the name, or leave it out."
        )
    data = training_set(examples, encoder, teacher_encoder)
    validation, validates_teacher = None, True
    if recipe.data.validation:
        held_out, more = read_noted(recipe.data.validation, columns, context)
        held_out = held_out[: recipe.evaluation.num_examples]
        validates_teacher = reads(held_out, context)
        validation = evaluation_set(
            held_out, encoder, teacher_encoder if validates_teacher else None
        )
        preflight.check_contexts(recipe, context, validates_teacher)
        notes += [note for note in more if note not in notes]
        if sentence := overlap(examples, held_out).sentence():
            notes.append(str(Finding("PK109", sentence)))
    answered = [example for example in examples if example.responses]
    for finding in template_findings(encoder, answered[0]) if answered else ():
        notes.append(str(Finding("PK206", finding.sentence)))
    for note in notes:
        say(note)
    preflight.check_reads_more(method, recipe.teacher)
    metric, has_teacher = recipe.evaluation.metric, recipe.teacher is not None
    for found in preflight.check_data(method, data, validation, metric, has_teacher):
        say(str(found))
    return Requests(
        tokenizer=tokenizer,
        encoder=encoder,
        teacher_encoder=teacher_encoder,
        validates_teacher=validates_teacher,
        examples=examples,
        data=data,
        validation=validation,
    )


def _encoders(recipe: Recipe, tokenizer: Any, say: Say) -> tuple[Encoder, Encoder | None]:
    """How the student is asked, and how its teacher is, where that differs.

    A student without a chat template takes its teacher's.
    """
    teacher = load_tokenizer(recipe.teacher_model()) if recipe.teacher else None
    shared = teacher is not None and same_tokenizer(tokenizer, teacher)
    if shared and recipe.data.template == "auto" and adopt_chat_template(tokenizer, teacher):
        say(
            "the student's tokenizer has no chat template and takes the teacher's, which is saved "
            "with it (data.template: alpaca or none does without)"
        )
    encoder = Encoder.of_recipe(recipe, tokenizer, date=date_of_run(recipe.output))
    if teacher is None or recipe.teacher is None:
        return encoder, None
    own = encoder.for_teacher(recipe.teacher, teacher, shared=shared)
    if own and not shared:
        return encoder, own
    as_the_student = recipe.teacher.template is None
    if shared and as_the_student and (difference := template_difference(encoder, teacher)):
        say(str(Finding("PK205", difference)))
    return encoder, own
