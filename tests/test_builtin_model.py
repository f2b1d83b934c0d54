"""The built-in model: small, real, and able to say what it is."""

import json
import re

import pytest

from dvai_bridge import ChatMessage, Transformer, load_builtin_model, load_chat_template, load_tokenizer, open_gguf
from tests.builtin_corpus import ConversationSource, normalise
from tests.support import MODULE, require, start_bridge

SOURCE_LIMIT_BYTES = 128 * 1024
TRAINING_SEED = 38883  # of tests/train_builtin_model.py
DRAWS = 100_000  # about a third of what it is trained on
REFUSAL = r"demo|cannot|can't|not able|tiny|small|real model|don't know"

# Written without looking at the training text, and not changed to suit a model: questions, and what a sensible
# answer cannot do without.
QUESTIONS = [
    # greetings and small talk
    ("hiya, hope your day is going well", r"hello|hi\b|hey|welcome"),
    ("a very pleasant evening, bridge!", r"hello|hi\b|hey|welcome|good"),
    ("yo, anybody home?", r"hello|hi\b|hey|welcome|demo"),
    ("cheers mate, that helped a lot", r"welcome|glad|pleasure|happy"),
    ("ok I have to go now, see you", r"bye|see you|take care|soon|later"),
    # who and what
    ("what kind of thing am I talking to?", r"demo|DVAI|model"),
    ("Are you GPT-4 or something like that?", r"\b(no|not|neither)\b|demo"),
    ("and your name would be?", r"demo|DVAI"),
    ("Explain in two sentences what this bridge thing does.", r"openai|each request|device"),
    ("why would anyone want to run the DVAI bridge?", r"openai|device|private|offload|stay"),
    ("so what's the point of this program", r"openai|each request|device"),
    ("what sort of questions can I put to you?", r"what (the bridge|it) is|serve a real|pair"),
    # serving a real model
    ("I downloaded a gguf file, what do I type to use it?", r"--model"),
    ("which command loads my own language model", r"--model"),
    ("how can I swap you out for something smarter?", r"--model|real model"),
    ("Can it choose a model by itself from what is on my disk?", r"auto"),
    ("where do I see the list of models you found on this computer", r"models"),
    ("does it read safetensors or which file type is needed?", r"GGUF"),
    # pairing and offload
    ("my laptop is too slow, can the gaming PC next door do the work?", r"--lan|--offload"),
    ("how would I connect my raspberry pi with my desktop", r"--lan|--offload"),
    ("I want my phone to borrow the power of my workstation", r"--lan|--offload"),
    ("what are the steps to link two machines over wifi", r"--lan|--offload"),
    ("is there a way to pair when I'm away from home?", r"\bqr\b|relay"),
    ("do I need to scan something to join devices over the internet", r"\bqr\b|scan"),
    # calling it
    ("what base url do I give the openai python library?", r"127\.0\.0\.1"),
    ("how do i send requests from my own code", r"openai|127\.0\.0\.1|curl"),
    ("which port number does the server use", r"38883"),
    ("do I have to pay for an api key", r"\b(no|none|any|free|not|without)\b"),
    # privacy, needs, licence, trouble
    ("can other people read what I write here?", r"device|private|privacy|encrypt|ciphertext"),
    ("is my data sent to some cloud?", r"device|private|privacy|encrypt|ciphertext"),
    ("what do I have to install before I can run this", r"python|nothing"),
    ("am I allowed to use it in a commercial product?", r"\bMIT\b"),
    ("it crashes on my box, what should I check first", r"doctor"),
    ("how do I make it faster?", r"llama-cpp|pair|device|speed|--offload"),
    ("how do I shut the server down again", r"ctrl|control"),
    # out of scope: an honest refusal
    ("who won the football world cup in 1998?", REFUSAL),
    ("write me a haiku about autumn leaves", REFUSAL),
    ("what is 17 times 23", REFUSAL),
    ("give me a recipe for pancakes", REFUSAL),
    ("will it rain in Oslo tomorrow?", REFUSAL),
]


@pytest.fixture(scope="module")
def gguf():
    return open_gguf(load_builtin_model())


def test_its_source_is_small():
    text = MODULE.read_text("utf-8")
    assert len(text[text.index("\n# ---- Built-in model ") :].encode()) <= SOURCE_LIMIT_BYTES


def test_it_is_a_llama_with_a_licence(gguf):
    assert gguf.metadata["general.architecture"] == "llama"
    assert gguf.metadata["general.license"].upper() == "MIT"


def test_the_questions_are_not_in_its_training_text():
    questions = {normalise(question): question for question, _ in QUESTIONS}
    source = ConversationSource(TRAINING_SEED)
    drawn = {normalise(source.draw_turn(False)[0]) for _ in range(DRAWS)}
    assert len(questions) == 40 and len(drawn) > DRAWS / 2
    assert not questions.keys() & drawn


def ask(bridge, *turns, temperature=0):
    messages = [{"role": role, "content": content} for role, content in turns]
    status, _, body = bridge.request(
        "POST", "/v1/chat/completions", {"messages": messages, "temperature": temperature, "seed": 1}
    )
    assert status == 200
    return json.loads(body)["choices"][0]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    with start_bridge(tmp_path_factory.mktemp("home")) as running:
        yield running


def test_it_answers_questions_that_it_has_not_seen(bridge):
    answers = [(question, wanted, ask(bridge, ("user", question))) for question, wanted in QUESTIONS]
    said = [(question, wanted, answer["message"]["content"]) for question, wanted, answer in answers]
    wrong = [(question, text) for question, wanted, text in said if not re.search(wanted, text, re.IGNORECASE)]
    assert len(answers) == 40 and len(wrong) <= 8, wrong
    assert all(answer["finish_reason"] == "stop" for *_, answer in answers), "it stops by itself"


def test_it_says_that_it_is_a_demonstration(bridge):
    for turns in ([("user", "What are you?")], [("system", "You are a helpful assistant."), ("user", "what are you")]):
        assert "demo" in ask(bridge, *turns)["message"]["content"].lower()


def test_it_follows_a_conversation(bridge):
    first = ask(bridge, ("user", "hello"))["message"]["content"]
    second = ask(bridge, ("user", "hello"), ("assistant", first), ("user", "how do I serve a real model?"))
    assert "--model" in second["message"]["content"]


@pytest.mark.llama
def test_llama_cpp_loads_the_same_bytes_and_writes_the_same_tokens(gguf, tmp_path):
    llama_cpp = require("llama_cpp")
    path = tmp_path / "builtin.gguf"
    path.write_bytes(load_builtin_model())
    llama = llama_cpp.Llama(str(path), n_ctx=512, verbose=False, logits_all=False)
    tokenizer, template = load_tokenizer(gguf.metadata), load_chat_template(gguf.metadata)
    for question in ("What are you?", "how do I pair my phone with my desktop"):
        prompt = template.render([ChatMessage(role="user", content=question)])
        ids = tokenizer.encode(prompt, add_special=True, parse_special=True)
        assert ids == llama.tokenize(prompt.encode(), add_bos=True, special=True)
        llama.reset()
        theirs = []
        for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
            theirs.append(token)
            if len(theirs) == 64:
                break
        assert generate_greedily(gguf, ids, 64) == theirs


def generate_greedily(gguf, ids, count):
    """`count` tokens, going on after the end of the answer as llama.cpp's loop does."""
    transformer = Transformer.load(gguf, n_ctx=512, on_progress=lambda done, total: None)
    cache, tokens = transformer.new_cache(), []
    transformer.prefill(cache, ids[:-1])
    token = ids[-1]
    for _ in range(count):
        logits = transformer.decode(cache, token)
        token = max(range(len(logits)), key=logits.__getitem__)
        tokens.append(token)
    return tokens
