"""Prompts, slots and answers as every engine that samples by itself uses them."""

from dataclasses import dataclass, field

import pytest

from dvai_bridge import (
    AnswerWriter,
    ChatMessage,
    ContextLengthError,
    EngineUnavailableError,
    Finished,
    GenerationRequest,
    InvalidRequestError,
    PromptEncoder,
    Slot,
    TextDelta,
    load_chat_template,
    load_tokenizer,
    open_gguf,
    prepare_slot,
)
from tests.support_worker import END_ID, PIECES, build_byte_model

N_CTX = 40


@pytest.fixture(scope="module")
def encoder():
    with open_gguf(build_byte_model()) as gguf:
        tokenizer = load_tokenizer(gguf.metadata)
        template = load_chat_template(gguf.metadata)
    return PromptEncoder(tokenizer=tokenizer, template=template, n_ctx=N_CTX, token_limit_bytes=max(map(len, PIECES)))


def encode(text):
    return [PIECES.index("\u2581") if char == " " else 3 + ord(char) for char in text]


@dataclass
class PlainCache:
    """A cache that can forget a part of what it holds, or (`is_whole`) only all."""

    length: int = 0
    is_whole: bool = False
    copies: list = field(default_factory=list)

    def truncate(self, length):
        if length < self.length:
            self.length = 0 if self.is_whole else length

    def copy_from(self, other):
        self.length = other.length
        self.copies.append(other)


def build_slots(*contents, **cache):
    """Slots with these (tokens, tenant), in the order of their use."""
    return [
        Slot(cache=PlainCache(len(tokens), **cache), tokens=list(tokens), tenant=tenant, last_used=order)
        for order, (tokens, tenant) in enumerate(contents, 1)
    ]


def test_a_prompt_is_encoded_with_its_beginning(encoder):
    assert encoder.encode_request(GenerationRequest(prompt="a b")) == [1, *encode("a b")]
    assert encoder.encode_request(GenerationRequest(prompt=(5, 6))) == [5, 6]
    chat = GenerationRequest(messages=(ChatMessage(role="user", content="a"),))
    assert encoder.encode_request(chat) == [1, *encode("User: a\nAssistant:")]


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("a" * (N_CTX - 1), N_CTX), ((5,) * N_CTX, N_CTX), ("a" * 16 * N_CTX + "b", 16 * N_CTX - 16), ("a" * 9**5, 591)],
    ids=["one too many", "tokens", "its beginning is too long", "by its size alone"],
)
def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(encoder, prompt, count):
    with pytest.raises(ContextLengthError) as caught:
        encoder.encode_request(GenerationRequest(prompt=prompt))
    assert caught.value.extra == {"n_prompt_tokens": count, "n_ctx": N_CTX} and caught.value.param == "prompt"


def test_a_prompt_that_just_fits_is_taken(encoder):
    assert len(encoder.encode_request(GenerationRequest(prompt="a" * (N_CTX - 2)))) == N_CTX - 1


@pytest.mark.parametrize("prompt", [(), (len(PIECES),)])
def test_tokens_that_do_not_exist_are_refused(encoder, prompt):
    with pytest.raises(InvalidRequestError):
        encoder.encode_request(GenerationRequest(prompt=prompt))


def test_a_conversation_that_goes_on_stays_in_its_slot():
    slots = build_slots(([1, 2, 3], "a"), ([1, 9], "a"), ([], ""))
    slot = prepare_slot(slots, [1, 2, 3, 4], "a")
    assert slot is slots[0] and slot.tokens == [1, 2, 3] and slot.cache.length == 3


def test_the_last_token_of_a_prompt_is_never_reused():
    slots = build_slots(([1, 2, 3], "a"))
    assert prepare_slot(slots, [1, 2, 3], "a").tokens == [1, 2]


def test_another_tenant_finds_nothing():
    slots = build_slots(([1, 2, 3], "a"))
    slot = prepare_slot(slots, [1, 2, 3, 4], "b")
    assert slot.tokens == [] and slot.cache.length == 0 and slot.tenant == "b" and not slot.cache.copies


def test_a_short_prefix_in_common_is_copied_to_the_slot_unused_for_longest():
    slots = build_slots(([7], "a"), ([1, 2, 3, 4, 5, 6], "a"))
    slot = prepare_slot(slots, [1, 2, 8, 9], "a")
    assert slot is slots[0] and slot.tokens == [1, 2] and slot.cache.copies == [slots[1].cache]
    assert slots[1].tokens == [1, 2, 3, 4, 5, 6]


def test_what_is_too_short_to_be_worth_it_is_not_copied():
    slots = build_slots(([7], "a"), ([1, 2, 3, 4, 5, 6], "a"))
    slot = prepare_slot(slots, [1, 2, 8, 9], "a", 3)
    assert slot is slots[0] and slot.tokens == [] and not slot.cache.copies


def test_a_busy_slot_gives_a_copy():
    slots = build_slots(([1, 2, 3], "a"), ([], ""))
    slots[0].busy = True
    slot = prepare_slot(slots, [1, 2, 3, 4], "a")
    assert slot is slots[1] and slot.tokens == [1, 2, 3] and slot.cache.length == 3
    slots[1].busy = True
    with pytest.raises(EngineUnavailableError):
        prepare_slot(slots, [1], "a")


def test_a_cache_that_forgets_all_or_nothing_takes_its_tokens_along():
    slots = build_slots(([1, 2, 3], "a"), is_whole=True)
    assert prepare_slot(slots, [1, 2, 9], "a").tokens == []
    slots = build_slots(([1, 2, 3], "a"), is_whole=True)
    assert prepare_slot(slots, [1, 2, 3, 4], "a").tokens == [1, 2, 3]


def write(encoder, text, *, end=False, **fields):
    """(text, the last event, events) of an answer that would be `text`; `compute` is not to be called."""
    request = GenerationRequest(prompt=(1, 2, 3), **fields)
    writer = AnswerWriter(request, [1, 2, 3], encoder, iter(range(1000)).__next__)
    events = []
    for token in [*encode(text), *([END_ID] if end else [])]:
        events += writer.write(token, None)
        if events and isinstance(events[-1], Finished):
            break
    return "".join(event.text for event in events if isinstance(event, TextDelta)), events


def test_an_answer_ends_where_the_model_ends_it(encoder):
    text, events = write(encoder, "abc", end=True)
    assert text == "abc" and events[-1].finish_reason == "stop"
    usage = events[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.prompt_ms) == (3, 4, 1000)


def test_an_answer_ends_before_a_stop_sequence(encoder):
    text, events = write(encoder, "ab##cd", stop=("##",))
    assert text == "ab" and events[-1].finish_reason == "stop" and events[-1].usage.completion_tokens == 4


def test_an_answer_ends_at_its_limit_with_what_was_held_back(encoder):
    text, events = write(encoder, "ab#cd", stop=("##",), max_tokens=3)
    assert text == "ab#" and events[-1].finish_reason == "length"


def test_an_answer_ends_when_the_context_is_full(encoder):
    text, events = write(encoder, "x" * 100)
    assert events[-1].finish_reason == "length"
    assert len(text) == N_CTX - 3 + 1  # the last token is shown and never computed


def test_empty_deltas_are_left_out(encoder):
    assert all(event.text for event in write(encoder, "a##b##", stop=("###",), end=True)[1][:-1])


def test_log_probabilities_are_asked_for_each_token(encoder):
    asked = []

    def compute(token, count):
        asked.append((token, count))
        return -1.0, [(token, -1.0), (encode("z")[0], -2.0)]

    writer = AnswerWriter(GenerationRequest(prompt=(1,), top_logprobs=2), [1], encoder, lambda: 0.0)
    (delta,) = writer.write(encode("a")[0], compute)
    (entry,) = delta.logprobs
    assert asked == [(encode("a")[0], 2)] and (entry.text, entry.logprob) == ("a", -1.0)
    assert [other.text for other in entry.top] == ["a", "z"]
