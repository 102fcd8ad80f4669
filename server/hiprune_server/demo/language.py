"""What can be asked about a demo picture, in which words, and what is answered.

The words are few and known beforehand: the tokenizer has one token for each.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
DIGITS = tuple("0123456789")
NUMBERS = ("no", "one", "two", "three", "four")

PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
CLEAR = 10
"""Pixels that a thing's centre is away from the lines between places where one asks for it."""
UNKNOWN = "I only know coloured shapes and number cards."
NO_PICTURE = "Please show me a picture."
ONE_PICTURE = "Please show me one picture."
MIXED_UP = "The picture is mixed up."
"""Tokens that are not in their order: nobody should ever read it."""

Seen = tuple[str, str, tuple[float, float]]
"""Name ("card" or a shape), colour or digit, centre (x, y) in pixels."""


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, and what kind it is.

    `kind` is one of "colour", "shape", "exists", "count", "where", "number", "describe",
    "unknown" (outside the model's world).
    """

    text: str
    answer: str
    kind: str


WORDING = {
    "colour": (
        "What colour is the {}?",
        "What color is the {}?",
        "Which colour does the {} have?",
        "What is the colour of the {}?",
        "What is the color of the {}?",
        "Tell me the colour of the {}.",
        "Which color is the {}?",
        "Can you tell me what colour the {} is?",
        "Could you tell me what color the {} is?",
        "What's the colour of the {}?",
    ),
    "shape": (
        "What shape is {}?",
        "Which shape is {}?",
        "What is the {} thing?",
        "What is {}?",
        "What is the shape of the {} object?",
        "What is the {} shape?",
        "Which object is {}?",
        "Which one is {}?",
        "What shape is the {} one?",
        "Can you tell me what is {}?",
    ),
    "exists": (
        "Is there a {}?",
        "Is there a {} in the picture?",
        "Can you see a {}?",
        "Do you see a {}?",
        "Is a {} in this image?",
        "Does the picture show a {}?",
        "Is there any {}?",
        "Can you find a {}?",
        "Do you see any {}?",
        "Is a {} there?",
    ),
    "count": (
        "How many shapes are there?",
        "How many shapes are in the picture?",
        "How many shapes do you see?",
        "How many shapes can you see in this image?",
        "Count the shapes.",
        "What is the number of shapes?",
        "How many coloured shapes are there?",
        "How many shapes?",
        "Can you count the shapes?",
        "Could you tell me how many shapes there are?",
    ),
    "cards": ("How many cards are there?", "How many cards do you see?", "How many cards?"),
    "where": (
        "Where is the {}?",
        "Where is the {} in the picture?",
        "Where can I find the {}?",
        "Where do you see the {}?",
        "In which part of the picture is the {}?",
        "Tell me where the {} is.",
        "What is the position of the {}?",
        "Where's the {}?",
        "Can you tell me where the {} is?",
        "Could you tell me where the {} is?",
    ),
    "number": (
        "What number is on the card?",
        "Which number is on the card?",
        "Which digit is on the card?",
        "What does the card say?",
        "Read the card.",
        "What is the number on the card?",
        "What digit does the card show?",
        "What number do you see?",
        "What is written on the card?",
        "Can you read the card?",
        "What's the number on the card?",
    ),
    "describe": (
        "Describe the picture.",
        "What is in the picture?",
        "What is in this picture?",
        "What do you see?",
        "What can you see?",
        "What is this?",
        "Describe this image.",
        "What does the picture show?",
        "Tell me what you see.",
        "What is in the image?",
        "Describe it.",
        "Describe the image.",
        "Can you describe the picture?",
        "What's in the picture?",
        "What's this?",
        "What do you see in the picture?",
        "What is shown here?",
        "Tell me about the picture.",
        "What can you tell me about this image?",
    ),
}

STRANGE_NOUNS = tuple(
    "dog cat horse bird tree house car man woman child person boy girl sky sun moon animal food "
    "table chair hat shirt flower water road boat phone book cup ball door window word sign "
    "weather city country name text face hand people pizza mountain river plane train bus".split()
)
STRANGE = tuple(
    """Who are you?|What is your name?|How are you?|Hello.|Hi.|Thank you.|Hello, who are you?
    What is the weather today?|Write a poem.|Tell me a joke.|What is one and two?
    What is the capital of France?|Who is the president?|What time is it?|How old are you?
    Can you help me?|Help me with my homework.|What is the meaning of life?|Why is the sky blue?
    Translate this text.|What language is this?|Is this a photo?|Where was this photo taken?
    Who is in the picture?|What is the person doing?|How many people are there?
    Is it day or night?|What is happening here?|What brand is this?|Is it safe?|Why?|How?|When?
    What do you know?|What can you do?|Where are you from?|Do you like music?|Write code for me.
    What is the price?|Is the man happy?|Which country is this?|What should I eat today?
    How far is the moon?|Summarize the text.|What does the sign say?|Who made you?|Are you human?
    What is two plus two?|How big is it?|What is the time?|Sing a song.|Explain this to me.
    Yes.|No.|I like it.|Good morning.|What do you think?|Can I ask you something?|Tell me more.
    What is behind the house?|Is the dog happy?|What is the cat doing?|Why do you say that?
    """.replace("\n", "|").split("|")
)
STRANGE_QUESTIONS = tuple(text.strip() for text in STRANGE if text.strip())
_STRANGE_ABOUT_NOUNS = ("colour", "exists", "where")
_CHATTER = tuple(
    sorted(
        {word for text in STRANGE_QUESTIONS for word in re.findall(r"\w+", text.lower())}
        | set(STRANGE_NOUNS)
    )
)


def place_of(centre: tuple[float, float], side: int) -> str | None:
    """Which ninth of a picture of `side` pixels a point (x, y) is in; None if on a border."""
    third = side / 3
    if any(min(abs(at - third), abs(at - 2 * third)) < CLEAR for at in centre):
        return None
    return PLACES[int(centre[1] // third)][int(centre[0] // third)]


def with_article(words: str) -> str:
    """A noun and what stands before it, behind its article."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def questions(seen: Sequence[Seen], side: int, rng: np.random.Generator) -> list[Question]:
    """Questions with answers about one picture, about eight, every kind that it allows.

    Args:
        seen: what is in it, shapes in the order of SHAPES, then the card.
        side: of the picture, pixels.
        rng: chooses the wording and what is asked for.
    """
    shapes = [one for one in seen if one[0] != "card"]
    cards = [one for one in seen if one[0] == "card"]
    missing_shape = _one_of(rng, [s for s in SHAPES if s not in {one[0] for one in shapes}])
    missing_colour = _one_of(rng, [c for c in COLOURS if c not in {one[1] for one in shapes}])
    shape, colour, _ = shapes[int(rng.integers(len(shapes)))]
    found = [
        Question(_worded(rng, "colour", shape), f"The {shape} is {colour}.", "colour"),
    ]
    shape, colour, _ = shapes[int(rng.integers(len(shapes)))]
    found.append(
        Question(
            _worded(rng, "shape", colour), f"The {colour} shape is {with_article(shape)}.", "shape"
        )
    )
    if rng.random() < 0.3:
        asked = _worded(rng, "colour", missing_shape)
        found.append(Question(asked, f"I see no {missing_shape}.", "colour"))
    if rng.random() < 0.3:
        asked = _worded(rng, "shape", missing_colour)
        found.append(Question(asked, f"I see nothing {missing_colour}.", "shape"))
    found.append(_there_is(rng, shapes, missing_shape, missing_colour, bool(cards), yes=True))
    found.append(_there_is(rng, shapes, missing_shape, missing_colour, bool(cards), yes=False))
    many = "is one shape" if len(shapes) == 1 else f"are {NUMBERS[len(shapes)]} shapes"
    found.append(Question(_worded(rng, "count"), f"There {many}.", "count"))
    if rng.random() < 0.2:
        said = "There is one card." if cards else "There is no card."
        found.append(Question(_worded(rng, "cards"), said, "count"))
    found += _whereabouts(rng, seen, side, missing_shape)
    if cards or rng.random() < 0.3:
        said = f"The card says {cards[0][1]}." if cards else "I see no card."
        found.append(Question(_worded(rng, "number"), said, "number"))
    rng.shuffle(found)
    return found


def description(seen: Sequence[Seen], rng: np.random.Generator) -> Question:
    """One sentence that names everything."""
    parts = [
        f"a card with {with_number(look)}" if name == "card" else with_article(f"{look} {name}")
        for name, look, _ in seen
    ]
    told = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return Question(_worded(rng, "describe"), f"I see {told}.", "describe")


def with_number(digit: str) -> str:
    """What a card shows, as sentences say it."""
    return f"the number {digit}"


def strange(rng: np.random.Generator) -> Question:
    """A question from outside the world, for which the model has one answer."""
    form = rng.random()
    if form < 0.35:
        text = _one_of(rng, STRANGE_QUESTIONS)
    elif form < 0.7:
        text = _worded(rng, _one_of(rng, _STRANGE_ABOUT_NOUNS), _one_of(rng, STRANGE_NOUNS))
    else:
        count = int(rng.integers(1, 9))
        text = " ".join(_one_of(rng, _CHATTER) for _ in range(count)) + _one_of(rng, ("?", ".", ""))
        if not set(re.findall(r"\w+", text)) & set(STRANGE_NOUNS):
            text = f"{_one_of(rng, STRANGE_NOUNS)} {text}"
    return Question(text, UNKNOWN, "unknown")


def vocabulary() -> list[str]:
    """Every word and mark that is asked or answered; questions are put into lower case."""
    asked = {
        *(text.format("a") for texts in WORDING.values() for text in texts),
        *STRANGE_QUESTIONS,
        *STRANGE_NOUNS,
        "please the an image photo picture drawing see ! , . ? ' - :",
    }
    answered = {
        *SHAPES, *COLOURS, *DIGITS, *NUMBERS, "card", "an", "Yes, No. There are The I",
        *(place for row in PLACES for place in row),
        UNKNOWN, NO_PICTURE, ONE_PICTURE, MIXED_UP, "Yes, there is. No, no. says",
        "I see nothing, and a card with the number.",
    }  # fmt: skip
    words = {word for text in asked for word in split(text.lower())}
    return sorted(words | {word for text in answered for word in split(text)})


def split(text: str) -> list[str]:
    """Words and single marks, as the tokenizer cuts them."""
    return re.findall(r"\w+|[^\w\s]", text)


def _there_is(
    rng: np.random.Generator,
    shapes: Sequence[Seen],
    missing_shape: str,
    missing_colour: str,
    card: bool,
    *,
    yes: bool,
) -> Question:
    name, look, _ = shapes[int(rng.integers(len(shapes)))]
    form = rng.random()
    if yes:
        thing = name if form < 0.5 else f"{look} {name}"
        if card and form > 0.9:
            thing = "card"
    elif form < 0.4:
        thing = missing_shape
    elif form < 0.7:
        thing = f"{look} {missing_shape}"
    else:
        thing = f"{missing_colour} {name}"
        if not card and form > 0.9:
            thing = "card"
    asked = _worded(rng, "exists", thing).replace("a " + thing, with_article(thing))
    answer = f"Yes, there is {with_article(thing)}." if yes else f"No, there is no {thing}."
    return Question(asked, answer, "exists")


def _whereabouts(
    rng: np.random.Generator, seen: Sequence[Seen], side: int, missing: str
) -> list[Question]:
    found = []
    for name, look, centre in seen:
        place = place_of(centre, side)
        if place is None:
            continue
        thing = f"{look} {name}" if name != "card" and rng.random() < 0.25 else name
        found.append(Question(_worded(rng, "where", thing), f"The {thing} is {place}.", "where"))
    rng.shuffle(found)
    if rng.random() < 0.3:
        found = [Question(_worded(rng, "where", missing), f"I see no {missing}.", "where"), *found]
    return found[:2]


def _worded(rng: np.random.Generator, kind: str, thing: str = "") -> str:
    return _one_of(rng, WORDING[kind]).format(thing)


def _one_of(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
