"""What the checks before and during training look for: codes, meanings, remedies. No torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """One thing that is looked for.

    Attributes:
        outcome: refused: nothing is begun, or training stops; warning: it is said, and goes on.
    """

    code: str
    outcome: Literal["refused", "warning"]
    meaning: str
    remedy: str


@dataclass(frozen=True)
class Finding:
    """Something that a check has found and that doesn't stop the run."""

    code: str
    sentence: str

    def __str__(self) -> str:
        return f"warning: {self.sentence} ({self.code})"


CHECKS = (
    # 1xx: the data, against what method and evaluation need
    Check(
        "PK101",
        "refused",
        meaning="The method learns from reference responses, and a row has none.",
        remedy="Add an `output` column, or let the student generate: `promptkd`, `gkd`.",
    ),
    Check(
        "PK102",
        "refused",
        meaning="The method is steered by the validation loss, which needs references.",
        remedy="Set `data.validation` to held-out rows with references.",
    ),
    Check(
        "PK103",
        "refused",
        meaning="The method needs a teacher.",
        remedy="Add `teacher: {model: ...}`.",
    ),
    Check(
        "PK104",
        "refused",
        meaning="`evaluation.metric` measures what the recipe has no teacher or no references for.",
        remedy="Add them, or choose another metric.",
    ),
    Check(
        "PK105",
        "refused",
        meaning="Exposure bias needs a teacher with the student's tokenizer, and validation data.",
        remedy="Set `evaluation.exposure_bias_every_steps: 0`, or bring what is missing.",
    ),
    Check(
        "PK106",
        "refused",
        meaning="`global_batch_size` exceeds the training data: a step would see rows twice.",
        remedy="Lower it, or bring more data.",
    ),
    Check(
        "PK107",
        "refused",
        meaning="`global_batch_size` is smaller than the number of processes.",
        remedy="Raise it, or start fewer processes.",
    ),
    Check(
        "PK108",
        "refused",
        meaning="The data hold a token that the student has no embedding for.",
        remedy="Use the tokenizer that belongs to the model, or take the text out.",
    ),
    Check(
        "PK109",
        "warning",
        meaning="Validation requests are in the training data: scores will flatter.",
        remedy="Hold out other rows.",
    ),
    Check(
        "PK110",
        "warning",
        meaning="ROUGE-L can't read some of the validation references (it keeps a-z and 0-9 "
        "alone), so the student is chosen by the others; refused where these are most of them.",
        remedy="Set `evaluation.metric` to `rouge_l_unicode` or `exact_match`.",
    ),
    Check(
        "PK111",
        "refused",
        meaning="The method estimates its loss from the sampled tokens alone (`opd`), and "
        "`sampling` draws them from another law than the student's.",
        remedy="Set `sampling` to temperature 1, top_p 1, top_k 0, or use `gkd`.",
    ),
    Check(
        "PK112",
        "refused",
        meaning="The method teaches what only its teacher reads, and the teacher reads no more.",
        remedy="Set `teacher.context`, `teacher.system` or `teacher.context_template`.",
    ),
    # 2xx: the pair of models, and the machine
    Check(
        "PK201",
        "refused",
        meaning="Request, response and soft prompt together exceed a model's context.",
        remedy="Lower `data.max_request_tokens` or `data.max_response_tokens`.",
    ),
    Check(
        "PK202",
        "refused",
        meaning="What is put in front of the teacher doesn't change its hidden states.",
        remedy="Report the architecture; meanwhile use `gkd`.",
    ),
    Check(
        "PK203",
        "refused",
        meaning="Student and teacher have different token tables, and the method compares tokens.",
        remedy="Use a teacher with the student's tokenizer, or `seqkd`.",
    ),
    Check(
        "PK204",
        "refused",
        meaning="The student has its teacher's weights and reads what its teacher reads.",
        remedy="Name another student, make one (`promptkd init-student`), or let the teacher know "
        "more: `teacher.context`.",
    ),
    Check(
        "PK205",
        "warning",
        meaning="The chat template of the teacher differs from the student's, which both read.",
        remedy="Give the student's tokenizer the teacher's template.",
    ),
    Check(
        "PK206",
        "warning",
        meaning="The chat template changes requests or references.",
        remedy="The sentence names the option or the part of the template.",
    ),
    Check(
        "PK207",
        "warning",
        meaning="bf16 on a CPU that emulates it, about ten times slower than fp32.",
        remedy="Set `precision: auto`.",
    ),
    Check(
        "PK208",
        "warning",
        meaning="Checkpoints and students need more disk than is free.",
        remedy="Lower `checkpoints.keep`, or free some space.",
    ),
    Check(
        "PK209",
        "refused",
        meaning="No gradient, or none that is finite, comes through the teacher to its prompt.",
        remedy="Hold the teacher otherwise (`teacher.quantization`, `teacher.offload`).",
    ),
    # 3xx: while training
    Check(
        "PK301",
        "warning",
        meaning="Every response of the student in a step is empty.",
        remedy="Warm the student up with `kd`, or check the template.",
    ),
    Check(
        "PK302",
        "warning",
        meaning="The student's responses stop ending: far fewer end than at their best.",
        remedy="Lower the learning rates; for `promptkd` raise `method.regularizer`.",
    ),
    Check(
        "PK303",
        "warning",
        meaning="The teacher runs after its student: KL(p_P‖p) grows while KL(q‖p), the distance "
        "to the teacher as it came, no longer falls. A falling loss is no success then.",
        remedy="Lower `optimization.teacher_learning_rate`, or raise `method.regularizer`.",
    ),
    Check(
        "PK304",
        "warning",
        meaning="Nothing moves: for several steps the student's gradient is zero.",
        remedy="Compare student and teacher; check the data and the learning rate.",
    ),
    Check(
        "PK305",
        "warning",
        meaning="The adapted teacher stays where it began: KL(p_P‖p) is almost zero.",
        remedy="Raise `optimization.teacher_learning_rate` (10 to 100 times for a soft prompt).",
    ),
    Check(
        "PK306",
        "warning",
        meaning="The loss left all that was before: the steps are too long, and the run diverges.",
        remedy="Stop it, and go back with lower rates: `--restart-from STEP`.",
    ),
)
