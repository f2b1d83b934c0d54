"""Conversations for training the built-in demonstration model, drawn from the grammar in `builtin_corpus.txt`.

The text file says what people ask and what the model answers; this module makes endless conversations of it: it expands
the grammar, then writes as people do (capitals, contractions, greetings, typos, missing words) and joins several turns,
with and without a system prompt. Everything is drawn from a `random.Random`, so a seed names a corpus.
"""

import math
import random
import re
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

CORPUS_FILE = Path(__file__).with_name("builtin_corpus.txt")
HELD_OUT_FILE = Path(__file__).with_name("builtin_held_out.txt")
DEVELOPMENT_FILE = Path(__file__).with_name("builtin_development.txt")

# ---- The grammar: a phrase is a sequence of parts, a part is literal text or a choice of phrases ----


@dataclass(frozen=True)
class Choice:
    """One of several phrases, drawn in proportion to `weights`."""

    phrases: list["Phrase"]
    cumulative_weights: list[float]


Phrase = list[str | Choice]


@dataclass
class Intent:
    """One thing people want: what it is called, its answers, and the grammar of its questions."""

    name: str
    weight: float
    answers: list[str]
    questions: Choice


def count_phrases(phrase: Phrase) -> float:
    """Return how many texts a phrase can become."""
    return math.prod(sum(map(count_phrases, part.phrases)) for part in phrase if isinstance(part, Choice))


def build_choice(phrases: list[Phrase]) -> Choice:
    """Weigh phrases by the logarithm of their variety: rich ones come often, single sentences are not lost."""
    weights = [1 + math.log2(count_phrases(phrase)) for phrase in phrases]
    return Choice(phrases, list(accumulate(weights)))


def parse_phrase(text: str, slots: dict[str, Choice]) -> Phrase:
    """Parse `(a|b)`, `[a]` and `<slot>`."""
    stack: list[list[Phrase]] = [[[]]]
    for token in re.findall(r"<\w+>|[()\[\]|]|[^<()\[\]|]+|<", text):
        if token in "([":
            stack.append([[]])
        elif token == "|":
            stack[-1].append([])
        elif token in ")]":
            phrases = stack.pop() + ([[]] if token == "]" else [])
            stack[-1][-1].append(build_choice(phrases))
        elif token[0] == "<" and token[-1] == ">":
            stack[-1][-1].append(slots[token[1:-1]])
        else:
            stack[-1][-1].append(token)
    (phrases,) = stack
    return phrases[0] if len(phrases) == 1 else [build_choice(phrases)]


def expand_phrase(phrase: Phrase, rng: random.Random) -> str:
    """Draw one text of a phrase."""
    return "".join(part if isinstance(part, str) else expand_choice(part, rng) for part in phrase)


def expand_choice(choice: Choice, rng: random.Random) -> str:
    """Draw one text of a choice."""
    (phrase,) = rng.choices(choice.phrases, cum_weights=choice.cumulative_weights)
    return expand_phrase(phrase, rng)


def load_corpus(path: Path = CORPUS_FILE) -> tuple[dict[str, Choice], dict[str, Intent]]:
    """Read slots and intents."""
    blocks: list[tuple[list[str], list[str]]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("%"):
            blocks.append((line[1:].split(), []))
        elif line and not line.startswith("#"):
            blocks[-1][1].append(line)
    slots: dict[str, Choice] = {}
    for (kind, name, *_), lines in blocks:
        if kind == "slot":
            slots[name] = build_choice([parse_phrase(line, slots) for line in lines])
    intents: dict[str, Intent] = {}
    for (kind, name, *weight), lines in blocks:
        if kind == "intent":
            answers = [line[2:] for line in lines if line.startswith("= ")]
            questions = build_choice([parse_phrase(line, slots) for line in lines if not line.startswith("= ")])
            intents[name] = Intent(name, float(weight[0][1:]) if weight else 1.0, answers, questions)
    return slots, intents


# ---- Writing as people do ----

CHATTER = {"greet", "how_are_you", "thanks", "ok", "bye", "english_only"}
QUESTION_STARTS = r"(wh(at|ich|om?|ere|en|y)|how|is|are|am|does?|did|can|[cw]ould|should|will|may|must|has|have)\b"
PROPER_SPELLINGS = """
DVAI OpenAI GGUF Python QR API LAN LLM AI HTTP URL GPU CPU RAM GB Linux Windows macOS Mac Ollama MIT Wi-Fi Hugging Face
ChatGPT GPT PC SDK LangChain Qwen Mistral JSON CUDA English German French
"""
SPELLINGS = {word.lower(): word for word in PROPER_SPELLINGS.split()}
SYNONYMS = [
    ["run", "execute", "start", "launch"],
    ["use", "employ", "utilize"],
    ["computer", "machine", "pc", "laptop", "notebook", "desktop", "device"],
    ["big", "large", "huge"],
    ["fast", "quick", "speedy"],
    ["show", "display", "print"],
    ["stop", "quit", "end", "terminate"],
    ["connect", "link", "hook up"],
    ["need", "require"],
    ["problem", "issue", "trouble"],
    ["begin", "start"],
    ["which", "what"],
    ["phone", "smartphone", "mobile", "tablet", "iphone"],
    ["program", "app", "application", "script"],
    ["get", "obtain", "receive"],
    ["prompts", "messages", "questions", "inputs", "chats"],
    ["wifi", "wi-fi", "wlan", "network"],
    ["folder", "directory"],
    ["weak", "slow", "old", "feeble"],
    ["strong", "powerful", "beefy", "mighty"],
    ["command", "instruction"],
    ["explain", "describe", "clarify"],
    ["send", "transmit", "forward"],
    ["store", "save", "keep"],
]
CONTRACTIONS = {
    "what is": "what's", "who is": "who's", "where is": "where's", "how is": "how's", "that is": "that's",
    "it is": "it's", "i am": "i'm", "do not": "don't", "does not": "doesn't", "is not": "isn't", "cannot": "can't",
    "will not": "won't", "i have": "i've", "i would": "i'd", "you are": "you're", "did not": "didn't",
    "let us": "let's", "i will": "i'll", "are you": "are u", "you": "u", "are not": "aren't",
}  # fmt: skip
LOOSE_WORDS = r"(the|an?|do|does|i|is|to|of|my|me|this|that|please|on|for|it|you|can|in|with|and)$"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def replace_synonyms(text: str, rng: random.Random) -> str:
    """Change some words into others of the same meaning."""
    words = text.split(" ")
    for i, word in enumerate(words):
        for group in SYNONYMS:
            if word in group and rng.random() < 0.25:
                words[i] = rng.choice(group)
    return " ".join(words)


def contract(text: str, rng: random.Random) -> str:
    """Write some word pairs in their short form."""
    for long, short in CONTRACTIONS.items():
        if long in text and rng.random() < (0.04 if short in ("u", "are u") else 0.35):
            text = re.sub(rf"\b{long}\b", rng.choice([short, short, short.replace("'", "")]), text)
    return text


def drop_words(text: str, rng: random.Random) -> str:
    """Leave out little words, as in search queries."""
    words = [word for word in text.split(" ") if not re.match(LOOSE_WORDS, word) or rng.random() < 0.5]
    return " ".join(words) if words else text


def misspell(text: str, rng: random.Random) -> str:
    """Put one typing error into one of the longer words."""
    words = text.split(" ")
    long_words = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    if not long_words:
        return text
    i = rng.choice(long_words)
    word, at = words[i], rng.randrange(1, len(words[i]) - 1)
    edits = (
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        word[:at] + rng.choice(LETTERS) + word[at + 1 :],
        word[:at] + rng.choice(LETTERS) + word[at:],
    )
    words[i] = rng.choice(edits)
    return " ".join(words)


def punctuate(text: str, is_question: bool, rng: random.Random) -> str:
    """Give a sentence its capital letter and its mark, mostly."""
    if rng.random() < 0.5:
        text = " ".join(SPELLINGS.get(word, word) for word in text.split(" "))
    if rng.random() < 0.6:
        text = re.sub(r"\bi\b", "I", text)
    if rng.random() < 0.6:
        text = text[:1].upper() + text[1:]
    if text.endswith(("?", "!", ".")):
        return text
    marks = (
        ["?", "?", "?", "?", "?", "", "", "??", " ?", "."] if is_question else [".", ".", "", "", "", "!", "?", "..."]
    )
    return text + rng.choice(marks)


def write_question(text: str, chatter: bool, slots: dict[str, Choice], rng: random.Random) -> str:
    """Turn a bare phrase into something that a person might type; `chatter` such as thanks gets little around it."""
    text = " ".join(text.split())
    is_question = re.match(QUESTION_STARTS, text) is not None
    framable = not chatter and len(text.split(" ")) > 2
    if rng.random() < 0.4:
        text = replace_synonyms(text, rng)
    if rng.random() < 0.6:
        text = contract(text, rng)
    if framable and rng.random() < 0.08:
        text = drop_words(text, rng)
    if framable and rng.random() < 0.15:
        text += rng.choice([" ", ", "]) + expand_choice(slots["closer"], rng)
    if not chatter and rng.random() < (0.22 if framable else 0.05):
        text = expand_choice(slots["opener"], rng) + rng.choice([", ", ", ", " ", "! ", ". ", ": "]) + text
    if rng.random() < 0.15:
        text = misspell(text, rng)
        text = misspell(text, rng) if rng.random() < 0.3 else text
    text = punctuate(text, is_question, rng)
    if framable and rng.random() < 0.05:
        aside = punctuate(expand_choice(slots["aside"], rng), False, rng)
        text = f"{aside} {text}" if rng.random() < 0.7 else f"{text} {aside}"
    return text.upper() if rng.random() < 0.015 else text


# ---- Questions kept for judgement ----


@dataclass(frozen=True)
class Judged:
    """A question written by hand and the intents that answer it."""

    intents: list[str]
    question: str


def load_questions(path: Path) -> list[Judged]:
    """Read lines `intent[,intent]: question`."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    pairs = [line.split(": ", 1) for line in lines]
    return [Judged(names.split(","), question) for names, question in pairs]


def normalise(question: str) -> str:
    """Reduce a question to its words, so that capitals and marks make no difference."""
    return " ".join(re.findall(r"\w+", question.lower()))


# ---- Conversations ----

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
FOLLOW_UPS = ["thanks", "bye", "ok", "cli_help", "serve_model", "pair_internet", "about_demo", "greet"]


@dataclass(frozen=True)
class Span:
    """A stretch of a conversation; `learned` where the model is to write it."""

    text: str
    learned: bool


class ConversationSource:
    """Draws conversations, none with a question kept for judgement; sources with the same seed draw the same."""

    def __init__(self, seed: int, path: Path = CORPUS_FILE) -> None:
        self.rng = random.Random(seed)
        self.slots, self.intents = load_corpus(path)
        self.names = list(self.intents)
        self.plain_share = 0.4
        self.excluded = {
            normalise(item.question) for file in (HELD_OUT_FILE, DEVELOPMENT_FILE) for item in load_questions(file)
        }
        self.weights = list(accumulate(self.intents[name].weight for name in self.names))

    def draw_turn(self, follow_up: bool) -> tuple[str, str]:
        """Return a question and its answer."""
        rng = self.rng
        if follow_up and rng.random() < 0.25:
            name = rng.choice(FOLLOW_UPS)
        else:
            (name,) = rng.choices(self.names, cum_weights=self.weights)
        intent = self.intents[name]
        question = write_question(expand_choice(intent.questions, rng), name in CHATTER, self.slots, rng)
        if normalise(question) in self.excluded:
            return self.draw_turn(follow_up)
        return question, rng.choice(intent.answers)

    def draw_system_prompt(self) -> str:
        """Return a system prompt, seldom a long one about anything."""
        rng = self.rng
        if rng.random() < 0.9:
            return expand_choice(self.slots["system"], rng)
        return " ".join(self.draw_turn(False)[0] for _ in range(rng.randint(1, 12)))

    def draw_conversation(self) -> list[Span]:
        """Return one conversation as ChatML."""
        rng = self.rng
        if rng.random() < self.plain_share:  # one question, which is where the answer is decided
            question, answer = self.draw_turn(False)
            return [Span(format_prompt([("user", question)]), False), Span(f"{answer}{IM_END}", True)]
        if rng.random() < 0.05:  # a raw completion: the question, a line break, the answer
            question, answer = self.draw_turn(False)
            return [Span(question, False), Span(f"\n{answer}{IM_END}", True)]
        spans = []
        if rng.random() < 0.6:
            spans.append(Span(f"{IM_START}system\n{self.draw_system_prompt()}{IM_END}\n", False))
        (turns,) = rng.choices([1, 2, 3, 4], [40, 35, 15, 10])
        for turn in range(turns):
            question, answer = self.draw_turn(turn > 0)
            spans.append(Span(f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n", False))
            spans.append(Span(f"{answer}{IM_END}", True))
            spans.append(Span("\n", False))
        return spans[:-1]


def format_prompt(messages: list[tuple[str, str]]) -> str:
    """Write (role, content) pairs as the chat template does, up to where the assistant speaks."""
    return "".join(f"{IM_START}{role}\n{text}{IM_END}\n" for role, text in messages) + f"{IM_START}assistant\n"
