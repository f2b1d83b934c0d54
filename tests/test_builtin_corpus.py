"""The corpus of the built-in model keeps its promises, and the model in the module is the one it says it is."""

import hashlib

import pytest
from builtin_corpus import (
    DEVELOPMENT_FILE,
    HELD_OUT_FILE,
    ConversationSource,
    format_prompt,
    load_corpus,
    load_questions,
    normalise,
)
from support import MODULE

import dvai_bridge
from dvai_bridge import ChatMessage, ModelFileError, load_builtin_model, load_chat_template, open_gguf

SECTION_LIMIT_BYTES = 131_072


@pytest.fixture(scope="module")
def source():
    return ConversationSource(1)


def test_the_same_seed_draws_the_same_conversations():
    first, second = ConversationSource(7), ConversationSource(7)
    assert [first.draw_conversation() for _ in range(50)] == [second.draw_conversation() for _ in range(50)]


@pytest.mark.parametrize("file", [HELD_OUT_FILE, DEVELOPMENT_FILE], ids=lambda file: file.stem)
def test_kept_questions_name_intents_that_exist(file):
    intents = load_corpus()[1]
    questions = load_questions(file)
    assert len(questions) >= 100
    assert {name for item in questions for name in item.intents} <= set(intents)


def test_no_kept_question_is_trained_on(source):
    kept = {normalise(item.question) for file in (HELD_OUT_FILE, DEVELOPMENT_FILE) for item in load_questions(file)}
    drawn = {normalise(source.draw_turn(False)[0]) for _ in range(20_000)}
    assert not drawn & kept


def test_a_question_that_the_grammar_makes_is_left_out_when_it_is_kept(source):
    question = normalise(source.draw_turn(False)[0])
    fresh = ConversationSource(1)
    fresh.excluded.add(question)
    assert normalise(fresh.draw_turn(False)[0]) != question


def test_answers_belong_to_one_intent_each():
    answers = [answer for intent in load_corpus()[1].values() for answer in intent.answers]
    assert len(answers) == len(set(answers))
    assert all(answer.isascii() and answer[-1] in ".!" for answer in answers)


def test_training_formats_prompts_as_the_model_s_template_does():
    with open_gguf(load_builtin_model()) as gguf:
        template = load_chat_template(gguf.metadata)
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "Which port?")]
    messages = [ChatMessage(role=role, content=content) for role, content in turns]
    assert template.render(messages) == format_prompt(turns)


def test_the_section_keeps_within_its_size():
    section = MODULE.read_text("utf-8").partition("# ---- Built-in model ---")[2]
    assert len(section.encode()) <= SECTION_LIMIT_BYTES


def test_the_loader_gives_the_bytes_that_were_trained():
    assert hashlib.sha256(load_builtin_model()).hexdigest() == dvai_bridge.BUILTIN_MODEL_SHA256


def test_a_damaged_copy_is_refused(monkeypatch):
    monkeypatch.setattr(dvai_bridge, "BUILTIN_MODEL_SHA256", "0" * 64)
    with pytest.raises(ModelFileError, match="damaged"):
        load_builtin_model()
