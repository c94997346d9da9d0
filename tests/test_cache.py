"""Teacher responses are found again by what they depend on, and by nothing less."""

import sqlite3
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import runs
import tiny
from promptkd.data import Encoder, Example
from promptkd.errors import UserError
from promptkd.generation.generators import Generation
from promptkd.generation.response_cache import ResponseCache, cache_directory, fingerprint
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine

DECODING = GenerationSettings(8).to_dict()


def test_what_was_put_is_found_by_a_later_process_too():
    first = ResponseCache("teacher")
    key = first.key((5, 6), DECODING, seed=0)
    assert key not in first
    first.put(key, (7, 3, 0))

    later = ResponseCache("teacher")
    assert later.key((5, 6), DECODING, seed=0) == key
    assert key in later
    assert later.get(key) == (7, 3, 0)


def test_a_response_depends_on_author_request_decoding_and_seed():
    cache = ResponseCache("teacher")
    keys = {
        cache.key((5, 6), DECODING, seed=0),
        ResponseCache("another").key((5, 6), DECODING, seed=0),
        cache.key((56,), DECODING, seed=0),
        cache.key((5, 6), GenerationSettings(8, temperature=0.5).to_dict(), seed=0),
        cache.key((5, 6), GenerationSettings(9).to_dict(), seed=0),
        cache.key((5, 6), DECODING, seed=1),
    }
    assert len(keys) == 6


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PROMPTKD_CACHE", str(tmp_path / "here" / "deep"))
    ResponseCache("teacher")
    assert (tmp_path / "here" / "deep" / "responses.sqlite").is_file()

    monkeypatch.delenv("PROMPTKD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "promptkd"


def test_two_caches_may_write_at_the_same_time():
    first, second = ResponseCache("teacher"), ResponseCache("teacher")
    for i in range(20):
        (first, second)[i % 2].put(str(i), (i, 0))
    assert [first.get(str(i)) for i in range(20)] == [(i, 0) for i in range(20)]


def test_a_damaged_cache_is_named_with_its_remedy(cache):
    (cache / "responses.sqlite").write_bytes(b"no database, but long enough to look" * 100)
    with pytest.raises(UserError, match=r"responses\.sqlite: file is not a database.* remove the"):
        ResponseCache("teacher")


def test_a_response_that_is_not_as_it_was_written_is_refused(cache):
    """SQLite checks its pages' structure, not what stands in them."""
    kept = ResponseCache("teacher")
    kept.put("key", (17, 3, 0))
    path = cache / "responses.sqlite"
    whole = path.read_bytes()
    for other in (b"[18, 3, 0]", b"[17, 3  0]", b"[17, 3, 9]", b"\xff" * 10):
        assert whole.count(b"[17, 3, 0]") == 1
        path.write_bytes(whole.replace(b"[17, 3, 0]", other))
        with pytest.raises(UserError, match=r"responses\.sqlite: .* remove the file"):
            ResponseCache("teacher").get("key")


def test_an_emptied_cache_is_filled_again_and_one_cut_in_half_is_refused(cache):
    kept = ResponseCache("teacher")
    for number in range(200):
        kept.put(f"key {number}", tuple(range(number)))
    path = cache / "responses.sqlite"
    whole = path.read_bytes()
    path.write_bytes(b"")
    assert "key 7" not in ResponseCache("teacher")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="remove the file"):
        [ResponseCache("teacher").get(f"key {number}") for number in range(200)]


def test_a_cache_that_cannot_be_opened_is_a_sentence(monkeypatch, cache):
    def closed(*_arguments, **_options):
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(sqlite3, "connect", closed)
    with pytest.raises(UserError, match=r"responses\.sqlite: unable to open database file"):
        ResponseCache("teacher")


def test_a_fingerprint_is_the_weights_and_not_where_they_lie():
    model = tiny.model("llama", seed=3)
    mark = fingerprint(model)

    assert fingerprint(tiny.model("llama", seed=3)) == mark
    assert fingerprint(tiny.model("llama", seed=4)) != mark
    assert fingerprint(tiny.model("llama", seed=3, num_layers=3)) != mark
    with torch.no_grad():
        model.model.norm.weight[5] += 1e-6
    assert fingerprint(model) != mark


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl", 4)
    return directory


def test_seqkd_asks_the_teacher_once_per_request_and_never_again(pair, tmp_path, cache):
    def train(name: str, **changes) -> dict:
        raw = tiny.recipe(pair, method={"name": "seqkd"}, output=str(tmp_path / name)) | changes
        raw["data"] |= {"max_response_tokens": 6}
        runs.train(raw)
        return runs.result(tmp_path / name)

    def num_kept() -> int:
        with sqlite3.connect(cache / "responses.sqlite") as database:
            return database.execute("SELECT COUNT(*) FROM responses").fetchone()[0]

    first = train("first")
    assert num_kept() == 4
    with sqlite3.connect(cache / "responses.sqlite") as database:
        written = database.execute("SELECT MIN(rowid), MAX(rowid) FROM responses").fetchone()
    assert train("second") == first
    with sqlite3.connect(cache / "responses.sqlite") as database:
        again = database.execute("SELECT MIN(rowid), MAX(rowid) FROM responses").fetchone()
    assert (num_kept(), again) == (4, written)
    assert train("other-seed", seed=1) != first
    assert num_kept() == 8


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """<eos>, <pad> and the 256 bytes: a character may be cut."""
    letters = ["<eos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    whole = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<eos>", pad_token="<pad>")


def learnt(teachers, response: tuple[int, ...]) -> tuple[int, ...]:
    """What a student with the tiny tokenizer learns of a response that a teacher wrote before."""
    encoder, rows = Encoder(tiny.tokenizer(), "none", 24, 6), len(teachers)
    student = tiny.language_model(tiny.model("llama"))
    author = tiny.language_model(tiny.model("llama", rows=rows), vocabulary=rows)
    engine, examples = TransformersEngine(student, (tiny.EOS,)), [Example("Why?")]
    generation = Generation(engine, student, GenerationSettings(6), encoder=encoder, seed=0)
    generation.add_teacher(author, teachers, examples, encoder)
    teacher = generation._teacher
    assert teacher
    request = teacher.encoder.request_ids(examples[0])
    teacher.cache.put(teacher.cache.key(request, generation.decoding.to_dict(), 0), response)
    return teacher.generate([encoder.encode(0, examples[0])])[0].response_ids


def test_a_teacher_of_the_students_tokens_hands_on_its_own_special_ones_among_them():
    written = (40, tiny.PAD, 41, tiny.EOS)
    assert learnt(tiny.tokenizer(), written) == written


def test_of_another_teachers_text_only_a_character_that_was_cut_is_left_out():
    teachers, students = byte_tokenizer(), tiny.tokenizer()
    so, half = teachers("So").input_ids, teachers("\u00e9").input_ids[:1]
    plain = tuple(students("So", add_special_tokens=False).input_ids)
    assert learnt(teachers, (*so, *half)) == plain
    assert learnt(teachers, (*so, tiny.EOS)) == (*plain, tiny.EOS)
