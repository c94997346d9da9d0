"""Who a run teaches, and by whom."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from promptkd.generation.response_cache import fingerprint
from promptkd.models import sharding
from promptkd.models.language_model import LanguageModel
from promptkd.models.sharding import WholeModel
from promptkd.teachers import Teacher
from promptkd.training.self_teacher import MovingAverage


@dataclass(frozen=True)
class Models:
    """Who a run teaches, and by whom.

    Attributes:
        plain_teacher: the recipe's teacher as it came; None if there is none.
        teacher: the same, as the method uses it; None if the method doesn't.
        average: of the student, where that is its teacher.
        comparable: whether student and teacher share a token table, so KLs can be measured.
        writer: the student as a plain model, if ``student`` is sharded.
        copies: the plain models of sharded ones, the student's first; ``plain_teacher`` is one.
    """

    student: LanguageModel
    plain_teacher: LanguageModel | None
    teacher: Teacher | None
    teacher_tokenizer: Any
    comparable: bool
    average: MovingAverage | None = None
    writer: LanguageModel | None = None
    copies: tuple[WholeModel, ...] = ()

    @property
    def whole_student(self) -> LanguageModel:
        """The student that writes, and is scored."""
        return self.writer or self.student

    @contextmanager
    def gathered(self, student: bool = True, teacher: bool = True) -> Iterator[None]:
        """Where these can write and be scored; of sharded ones all processes must ask."""
        with ExitStack() as stack:
            for wanted, copied in zip((student, teacher), self.copies, strict=False):
                if wanted:
                    stack.enter_context(copied.gathered())
            yield

    @contextmanager
    def saved_student(self) -> Iterator[PreTrainedModel]:
        """The student as it is saved, on the first process; of a sharded one all must ask."""
        with self.copies[0].on_first() if self.copies else nullcontext(self.student.module) as own:
            yield own

    def shared_out(self, device: torch.device) -> "Models":
        """The same in parts, of which this process has its own, with whole copies to gather.

        Raises:
            UserError: if an architecture can't be sharded.
        """
        student, other, teacher = self.student, self.plain_teacher, self.teacher
        mixed = student.dtype != student.module.dtype
        copies = [WholeModel(student.module, device, student.dtype if mixed else None)]
        writer = replace(student, module=copies[0].module)
        sharding.shard(student.module, device)
        if other:
            copies.append(WholeModel(other.module, device))
            sharding.shard(other.module, device)
            other = replace(other, module=copies[1].module)
        for own in [*teacher.parameters(), teacher.soft_prompt] if teacher else []:
            if own is not None:
                own.data = own.data.to(device)
        return replace(self, plain_teacher=other, writer=writer, copies=tuple(copies))

    def digests(self) -> dict[str, str]:
        """Of the weights; before they are shared out."""
        digests = {"student weights": fingerprint(self.student.module)}
        if self.plain_teacher:
            digests["teacher weights"] = fingerprint(self.plain_teacher.module)
        return digests
