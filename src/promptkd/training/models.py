"""A run's models: student, teacher, the student's moving average; whole, or in parts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from promptkd import kernels
from promptkd.generation.response_cache import fingerprint
from promptkd.models import sharding
from promptkd.models.language_model import LanguageModel
from promptkd.models.settings import generation_settings, settings, spelling
from promptkd.models.sharding import WholeModel
from promptkd.teachers import Teacher
from promptkd.training.identity import Contents
from promptkd.training.self_teacher import MovingAverage


@dataclass(frozen=True)
class Models:
    """Who a run teaches, and by whom.

    Attributes:
        plain_teacher: the recipe's teacher as it came; None if there is none.
        teacher: the same, as the method uses it; None if the method doesn't.
        average: of the student, where that is its teacher.
        comparable: whether student and teacher share a token table, so KLs can be measured.
        saved_dtype: the precision that the student came in, and is saved in.
        student_copy, teacher_copy: whole while they are gathered, if the models are sharded.
    """

    student: LanguageModel
    plain_teacher: LanguageModel | None
    teacher: Teacher | None
    teacher_tokenizer: Any
    comparable: bool
    saved_dtype: torch.dtype
    average: MovingAverage | None = None
    student_copy: WholeModel | None = None
    teacher_copy: WholeModel | None = None

    @property
    def whole_student(self) -> LanguageModel:
        """The student that writes and is scored, where it is ``gathered``."""
        copied = self.student_copy
        return replace(self.student, module=copied.module) if copied else self.student

    @property
    def whole_teacher(self) -> LanguageModel | None:
        """The plain teacher that writes, where it is ``gathered``."""
        teacher, copied = self.plain_teacher, self.teacher_copy
        return replace(teacher, module=copied.module) if teacher and copied else teacher

    def agree(self, here: bool) -> bool:
        """Whether it is so on any process, if the models are sharded; all of them must ask."""
        if self.student_copy is None:
            return here
        return bool(sharding.most([here], self.student.device)[0])

    @contextmanager
    def gathered(self, student: bool = True, teacher: bool = True) -> Iterator[None]:
        """Where these are whole; of sharded ones all processes must ask.

        What passes through the teacher have left gathered is given back.
        """
        if self.plain_teacher:
            sharding.release(self.plain_teacher.module)
        with ExitStack() as stack:
            if student and self.student_copy:
                stack.enter_context(self.student_copy.gathered())
            if teacher and self.teacher_copy:
                stack.enter_context(self.teacher_copy.gathered())
            yield

    @contextmanager
    def saved_student(self) -> Iterator[PreTrainedModel]:
        """The student as it is saved, on the first process; of a sharded one all must ask."""
        copied = self.student_copy
        with copied.on_first() if copied else nullcontext(self.student.module) as module:
            yield module

    def shared_out(self, device: torch.device, offload: bool, stays: bool) -> "Models":
        """The same in parts, of which this process keeps its own on ``device``.

        Args:
            device: of this process.
            offload: whether the teacher's are fetched from the machine's memory.
            stays: whether layers stay gathered for a step.

        Raises:
            UserError: if an architecture can't be sharded.
        """
        student, other, teacher = self.student, self.plain_teacher, self.teacher
        dtype = student.dtype if student.dtype != student.module.dtype else None
        student_copy = WholeModel(student.module, device, dtype)
        teacher_copy = WholeModel(other.module, device) if other else None
        kernels.prepare_learner(student.module, device)
        sharding.shard(student.module, device, dtype=dtype, stays=stays)
        if other:
            sharding.shard(other.module, device, offload=offload, stays=stays)
        for own in [*teacher.parameters(), teacher.soft_prompt] if teacher else []:
            if own is not None:
                own.data = own.data.to(device)
        return replace(self, student_copy=student_copy, teacher_copy=teacher_copy)

    def contents(self) -> Contents:
        """Of both directories, the student's tokenizer aside; before models are shared out."""
        student: Any = self.student.module
        contents: Contents = {
            "student weights": fingerprint(student),
            "student precision": str(self.saved_dtype),
            "student config": settings(student.config),
            "student generation_config": generation_settings(student),
        }
        if self.plain_teacher:
            teacher: Any = self.plain_teacher.module
            contents["teacher weights"] = fingerprint(teacher)
            contents["teacher config"] = settings(teacher.config)
            contents["teacher tokenizer"] = spelling(self.teacher_tokenizer)
        return contents
