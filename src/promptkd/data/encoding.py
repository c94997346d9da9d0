"""Examples as token ids: how student and teacher are asked, and where text is cut. No torch."""

import datetime
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from promptkd.config import Recipe, TeacherSection
from promptkd.data.briefing import Briefing
from promptkd.data.examples import Example, refuse_lone_surrogates
from promptkd.data.templates import (
    CHAT,
    DATA,
    TEACHER,
    apply_chat_template,
    check_options,
    reads_option,
    render_chat,
    resolved,
    template_of,
)
from promptkd.errors import UserError
from promptkd.files import read_json


@dataclass(frozen=True)
class EncodedExample:
    """An example as tokens. ``response_ids`` ends with EOS unless it was cut.

    Attributes:
        request_ids: as the student reads it.
        teacher_request_ids: as the teacher does; None where both read the same.
        where: the row's file and line, for messages.
    """

    index: int
    request_ids: tuple[int, ...]
    response_ids: tuple[int, ...] | None
    references: tuple[str, ...]
    teacher_request_ids: tuple[int, ...] | None = None
    where: str = field(default="", compare=False)

    def within(self, limit: int) -> "EncodedExample":
        """With at most ``limit`` tokens of its reference."""
        if self.response_ids is None or len(self.response_ids) <= limit:
            return self
        return replace(self, response_ids=self.response_ids[:limit])

    def request_of(self, teacher: bool) -> tuple[int, ...]:
        """As the teacher reads it, or the student."""
        return (self.teacher_request_ids if teacher else None) or self.request_ids


def date_of_run(directory: str | Path) -> datetime.date | None:
    """The date as of which a run renders its requests, as recorded; None before it began.

    Raises:
        UserError: if the record is damaged.
    """
    record = _record_of_run(directory)
    if "date" not in record:
        return None
    try:
        return datetime.date.fromisoformat(record["date"])
    except (TypeError, ValueError):
        raise UserError(
            f"{Path(directory) / 'environment.json'} has the date {record['date']!r}, written by "
            "somebody else. Write YYYY-MM-DD."
        ) from None


def template_of_run(directory: str | Path, template: str) -> str:
    """What a run's ``auto`` stood for when it began, whatever became of its student's files.

    Raises:
        UserError: if the record is damaged.
    """
    known = _record_of_run(directory).get("template")
    return known if template == "auto" and isinstance(known, str) else template


def _record_of_run(directory: str | Path) -> dict[str, Any]:
    path = Path(directory) / "environment.json"
    record = read_json(path, [])
    if record is None and path.exists():
        raise UserError(
            f"{path} is damaged, so nobody can say how and as of which day the run's requests were "
            "rendered. Put a copy of it back, or remove it: it is then today, and "
            "data.template: auto what the tokenizer has."
        )
    return record or {}


class Encoder:
    """Turns examples into token ids: one template, one tokenizer, one place where text is cut.

    Attributes:
        template: never ``auto``: what it stands for.
        template_options: given to the chat template.
        date: what a chat template that asks for today's date is told; today if not given.
        briefing: what only the teacher reads, for the teacher's encoder.
        key: of the recipe, that names the template, for complaints.
        eos_token_id: what ends a reference: the chat template's end of turn where there is one,
            else the tokenizer's end of sequence.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str = "auto",
        max_request_tokens: int = 256,
        max_response_tokens: int = 256,
        *,
        template_options: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
        briefing: Briefing | None = None,
        key: str = DATA,
    ):
        self.tokenizer = tokenizer
        self.key = key
        self.template = resolved(template, tokenizer, key)
        self.template_options = dict(template_options or {})
        self.max_request_tokens = max_request_tokens
        self.max_response_tokens = max_response_tokens
        self.date = date or datetime.date.today()
        self.briefing = briefing
        self.eos_token_id: int = tokenizer.eos_token_id
        check_options(self.template, tokenizer, self.template_options, key)
        self._wording = None
        if self.template == "chat":
            end = end_of_turn(tokenizer, self.template_options)
            self.eos_token_id = self.eos_token_id if end is None else end
        else:
            self._wording = template_of(self.template, key)

    @classmethod
    def of_recipe(
        cls,
        recipe: Recipe,
        tokenizer: Any,
        *,
        date: datetime.date | None = None,
        max_response_tokens: int | None = None,
        template: str | None = None,
    ) -> "Encoder":
        """The recipe's template and limits, with the tokenizer of any of its models.

        ``template``: what the recipe's stood for, in a run.
        """
        data = recipe.data
        return cls(
            tokenizer,
            template=template or data.template,
            max_request_tokens=data.max_request_tokens,
            max_response_tokens=max_response_tokens or data.longest_response,
            template_options=data.template_options,
            date=date,
        )

    def with_tokenizer(self, tokenizer: Any) -> "Encoder":
        """The same way to ask a teacher that has another tokenizer."""
        return Encoder(
            tokenizer,
            template=self.template,
            max_request_tokens=self.max_request_tokens,
            max_response_tokens=self.max_response_tokens,
            template_options=self._options_for(tokenizer),
            date=self.date,
            briefing=self.briefing,
            key=TEACHER,
        )

    def _options_for(self, tokenizer: Any) -> dict[str, Any]:
        """Those that another tokenizer's chat template reads, too."""
        return {n: own for n, own in self.template_options.items() if reads_option(tokenizer, n)}

    def for_teacher(
        self, section: TeacherSection, tokenizer: Any, *, shared: bool = True
    ) -> "Encoder | None":
        """How the teacher is asked; None where it reads what the student reads.

        Its requests are as long as they come unless ``teacher.max_request_tokens`` says otherwise.

        Args:
            section: the recipe's.
            tokenizer: the teacher's, whose chat template counts if the section names a template.
            shared: whether the student has the same tokens.

        Raises:
            UserError: for a template or a file that isn't one, and a system message without chat.
        """
        if not (section.reads_more or section.template or section.template_options):
            return None
        tokens = tokenizer if section.template or not shared else self.tokenizer
        template = resolved(section.template or self.template, tokens, TEACHER)
        inherited = self._options_for(tokens) if template == self.template else {}
        briefing = Briefing.of(section)
        if briefing.system and template != "chat":
            raise UserError(
                f"teacher.system needs a chat template, but the teacher's template is '{template}'."
                " Set teacher.template: chat, or write the text into teacher.context_template."
            )
        return Encoder(
            tokens,
            template=template,
            max_request_tokens=section.max_request_tokens or sys.maxsize,
            max_response_tokens=self.max_response_tokens,
            template_options={**inherited, **section.template_options},
            date=self.date,
            briefing=briefing,
            key=TEACHER,
        )

    def render(self, example: Example) -> str:
        """The request's text, up to where the response begins."""
        if self.briefing:
            example = self.briefing.example(example)
        if self._wording:
            return self._wording.render(example)
        return render_chat(self.tokenizer, example, self.template_options, self.date, key=self.key)

    def request_ids(self, example: Example) -> tuple[int, ...]:
        """The request as tokens, with the tokenizer's own start token if it has one.

        The same for training and evaluation; the authors' code adds the start token in
        evaluation only.
        """
        text = self.render(example)
        special = self.template != "chat"  # a chat template writes its special tokens itself
        refuse_lone_surrogates(text, example.at)
        ids = self.tokenizer(text, add_special_tokens=special).input_ids
        if ids and ids[-1] == self.tokenizer.eos_token_id and special:
            ids = ids[:-1]  # some tokenizers end every text; a request goes on
        if not ids:
            raise UserError(f"{example.at}{self.key} {self.template} makes no token of the row.")
        return tuple(ids)

    def response_ids(self, text: str) -> tuple[int, ...]:
        """A response as tokens, ending with one EOS unless it had to be cut."""
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        ends = {self.eos_token_id, self.tokenizer.eos_token_id}
        while ids and ids[-1] in ends:  # the text brought its own end
            ids.pop()
        return tuple([*ids, self.eos_token_id][: self.max_response_tokens])

    def encode(self, index: int, example: Example) -> EncodedExample:
        references = self.references(example)
        response = self.response_ids(references[0]) if references else None
        return EncodedExample(
            index=index,
            request_ids=self.request_ids(example),
            response_ids=response,
            references=references,
            where=example.where,
        )

    def references(self, example: Example) -> tuple[str, ...]:
        """As they are learnt and scored."""
        return tuple(map(self.without_end, example.responses))

    def without_end(self, text: str) -> str:
        """A text without the end markers that it spells out at its end; it is scored like that."""
        ids = {self.tokenizer.eos_token_id, self.eos_token_id}
        markers = self.tokenizer.convert_ids_to_tokens(sorted(ids))
        while marker := next((m for m in markers if text.rstrip().endswith(m)), None):
            text = text.rstrip().removesuffix(marker)
        return text

    def fits(self, example: Example) -> bool:
        return len(self.request_ids(example)) <= self.max_request_tokens

    def without_oldest_turns(self, example: Example) -> Example:
        """Leave out the oldest turns until the request fits.

        A system message and the last request stay, and the first turn kept is a user's.
        """
        turns = list(example.messages)
        while not self.fits(replace(example, messages=tuple(turns))):
            first = 1 if turns and turns[0]["role"] == "system" else 0
            users = [i for i, turn in enumerate(turns) if turn["role"] == "user" and i > first]
            if not users:
                break
            del turns[first : users[0]]
        return replace(example, messages=tuple(turns))

    def cut_to_fit(self, example: Example) -> Example:
        """Shorten the input, and where that isn't enough the instruction, until the request fits.

        The template stays whole; the authors' code cuts the end of the rendered text and so
        loses the '### Response:' line of the longest requests.

        Raises:
            UserError: if the template alone is too long.
        """
        part, text, without_input = "input", example.input, _replace(example, "input", "")
        if self.briefing:  # the request fits the student; what is cut is the teacher's own
            part, text = "teacher_context", example.teacher_context
        elif not text or not self.fits(without_input):
            part, text, example = "instruction", example.instruction, without_input
        shortest, longest = 0, len(text)
        while shortest < longest:
            middle = (shortest + longest + 1) // 2
            fits = self.fits(_replace(example, part, text[:middle]))
            shortest, longest = (middle, longest) if fits else (shortest, middle - 1)
        cut = _replace(example, part, text[:shortest])
        if not self.fits(cut):
            needed, limit = len(self.request_ids(cut)), self.max_request_tokens
            place = f"{example.where}: " if example.where else ""
            key, rest = "max_request_tokens", "the template alone"
            if self.briefing:
                key, rest = "teacher.max_request_tokens", "what isn't teacher.context"
            raise UserError(f"{place}{key} = {limit}, but {rest} has {needed}. Raise it.")
        return cut


def end_of_turn(tokenizer: Any, options: dict[str, Any]) -> int | None:
    """The special token that a chat template writes after an assistant's text; None if it has none.

    Found in the template's own rendering of a short conversation. A template that refuses it says
    so when it meets a real one.

    Raises:
        UserError: if the template writes half of a character.
    """
    answer = "promptkd"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = apply_chat_template(tokenizer, turns, CHAT[DATA], **options)
    except UserError:
        return None
    refuse_lone_surrogates(text, "What the chat template writes: ")
    after = text.rpartition(answer)[2].lstrip()
    ids = tokenizer(after, add_special_tokens=False).input_ids if after else []
    added = tokenizer.added_tokens_decoder
    if ids and (ids[0] in tokenizer.all_special_ids or (ids[0] in added and added[ids[0]].special)):
        return ids[0]
    return None


def _replace(example: Example, part: str, text: str) -> Example:
    turns = example.messages
    if part == "instruction" and turns:
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
        turns = (*turns[:last], {**turns[last], "content": text}, *turns[last + 1 :])
    return replace(example, messages=turns, **{part: text})
