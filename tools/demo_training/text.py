"""Second stage: projector and text model, on the finished encoder's features.

The features of some thousand pictures are kept; every step drops another part of each picture's
tokens, so that the model learns to read short and long visual prompts alike.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hiprune_server.demo.language import (
    COLOURS,
    DIGITS,
    MIXED_UP,
    NO_PICTURE,
    NUMBERS,
    ONE_PICTURE,
    SHAPES,
    Seen,
    description,
    place_of,
    questions,
    strange,
)
from hiprune_server.demo.world import HELD_OUT, SIDE, scene
from tools.demo_training.encoder import (
    GRID,
    PATCH_LABELS,
    VISION,
    WIDTH,
    Encoder,
    owner_of_patches,
    pixels_of,
)
from tools.demo_training.progress import SEED, Progress, prefetch
from tools.demo_training.words import (
    END,
    IDS,
    IMAGE,
    PAD,
    START,
    WORDS,
    answered,
    asked,
)

PICTURES = 5000
HELD_OUT_PICTURES = 64  # for the accuracy shown while it trains
FIRST_PICTURE = HELD_OUT // 2
"""Seeds of this stage's pictures; the encoder's are far below."""
STEPS = 5000
BATCH = 8
RATE = 2e-3
_WARM_UP = 100
_FEWEST = 16  # visual tokens
_WHOLE = 0.12  # share of steps that see all tokens
_BLIND = 0.3  # share of pictures with a question that comes without the picture
_MIXED_UP = 0.08  # share of pictures whose tokens are not in their order
_TWO = 0.06  # share of rows with two pictures
_PROBED = {
    "kind": ("no", *SHAPES, "card"),
    "colour": COLOURS,
    "digit": DIGITS,
    "row": ("top", "middle", "bottom"),
    "column": ("left", "middle", "right"),
}

_GAIN = {"kind": 0.25, "colour": 0.25, "digit": 0.4, "row": 0.5, "column": 0.5}
"""Makes the labels about equally loud: the encoder is less emphatic about some of them."""


@dataclass(frozen=True)
class Features:
    """The encoder's view of P pictures of N patches.

    Attributes:
        values: (P, N, WIDTH) float16.
        owners: (P, N) int64, 1 + index of the thing on a patch, else 0.
        seen: per picture, what can be asked about.
    """

    values: torch.Tensor
    owners: torch.Tensor
    seen: list[list[Seen]]


@dataclass(frozen=True)
class Lesson:
    """B packed rows: <s>, K visual tokens, then questions that do not see each other.

    Attributes:
        pictures: (B, K) int64, index into the features for every token.
        kept: (B, K) int64, ascending but for pictures that are mixed up.
        ids: (B, L) int64 of all that follows the visual tokens.
        positions: (B, 1 + K + L) int64.
        segments: (B, L) int64, number of the question, -1 for padding.
        blind: (B, L) bool, True where the question came without the picture.
        targets: (B, L) int64, the next token of an answer, -100 elsewhere.
    """

    pictures: torch.Tensor
    kept: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    blind: torch.Tensor
    targets: torch.Tensor


def features(encoder: Encoder, progress: Progress, folder: Path) -> tuple[Features, Features]:
    """Features of the training and of some held-out pictures, kept in `folder`."""
    seeds = [*range(FIRST_PICTURE, FIRST_PICTURE + PICTURES)]
    seeds += range(HELD_OUT, HELD_OUT + HELD_OUT_PICTURES)
    path = folder / "features.pt"
    if path.is_file():
        values, owners, seconds = torch.load(path, weights_only=True)
        progress.spent("features", seconds)
    else:
        places = torch.arange(GRID * GRID)
        values = torch.empty(len(seeds), GRID * GRID, WIDTH, dtype=torch.float16)
        owners = torch.empty(len(seeds), GRID * GRID, dtype=torch.int64)
        progress.start("features", [1.0] * len(seeds), 0)
        for i, (pixels, owner) in enumerate(prefetch(_seen_by_encoder, seeds)):
            with torch.no_grad():
                values[i] = encoder(pixels[None], places)[0, 1:].half()
            owners[i] = owner
            progress.show(i, {})
        torch.save((values, owners, progress.seconds()), path)
    seen = [scene(seed).seen() for seed in seeds]
    return (
        Features(values[:PICTURES], owners[:PICTURES], seen[:PICTURES]),
        Features(values[PICTURES:], owners[PICTURES:], seen[PICTURES:]),
    )


def _seen_by_encoder(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    one = scene(seed)
    return pixels_of(one), torch.from_numpy(owner_of_patches(one))


def empty_llava() -> LlavaForConditionalGeneration:
    """The whole model in LLaVA's layout, with fresh weights."""
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=384,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=4,
        max_position_embeddings=4096,
        rope_theta=1e6,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=VISION,
            text_config=text,
            image_token_index=IMAGE,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            projector_hidden_act="gelu",
            tie_word_embeddings=False,
        )
    )


def speak_the_labels(llava: Any, encoder: Encoder) -> None:
    """Starts the projector with what the encoder's linear layers read: label -> its word.

    Without it the text model needs far longer to find out what the features mean.
    """
    projector = llava.model.multi_modal_projector
    embeddings = llava.get_input_embeddings().weight
    unit = 0
    with torch.no_grad():
        embeddings.normal_(0.0, WIDTH**-0.5)
        projector.linear_2.bias.zero_()
        for name in PATCH_LABELS:
            layer: Any = encoder.read[name]
            for k, word in enumerate(_PROBED[name]):
                projector.linear_1.weight[unit] = layer.weight[k]
                projector.linear_1.bias[unit] = layer.bias[k]
                projector.linear_2.weight[:, unit] = _GAIN[name] * embeddings[IDS[word]]
                unit += 1


def train(encoder: Encoder, progress: Progress, folder: Path) -> Any:
    """Trains projector and text model, or goes on where it was interrupted."""
    seen, held_out = features(encoder, progress, folder)
    torch.manual_seed(SEED + 1)
    llava = empty_llava()
    speak_the_labels(llava, encoder)
    reader = nn.ModuleList(
        [llava.model.multi_modal_projector, llava.model.language_model, llava.lm_head]
    )
    optimizer = torch.optim.AdamW(
        reader.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.02
    )
    first = progress.resume("text", reader, optimizer)
    progress.start("text", [1.0] * STEPS, first)

    def make(step: int) -> Lesson:
        return lesson(seen, step)

    for step, one in enumerate(prefetch(make, range(first, STEPS)), first):
        fall = 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = RATE * min(fall + 0.005, (step + 1) / _WARM_UP)
        logits = read(llava, seen, one)
        loss = functional.cross_entropy(logits.flatten(0, 1), one.targets.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        told = {"loss": loss.item()}
        if step % 100 == 99:
            told |= exact_match(llava, held_out)
        progress.step(step, told, reader, optimizer)
    return llava.eval()


def lesson(seen: Features, step: int, *, all_tokens: bool = False, first: int = -1) -> Lesson:
    """What is learned in a step: always the same.

    Args:
        all_tokens: nothing is dropped.
        first: pictures `first`, `first + 1`, ... instead of a random choice.
    """
    rng = np.random.default_rng([SEED, step])
    count = GRID * GRID
    whole = all_tokens or rng.random() < _WHOLE
    keep = count if whole else int(np.exp(rng.uniform(np.log(_FEWEST), np.log(count))))
    size = BATCH // 2 if whole else BATCH
    chosen = rng.choice(len(seen.seen), size, replace=False)
    if first >= 0:
        chosen = np.arange(first, min(first + size, len(seen.seen)))
    tokens = [_tokens(seen, int(i), keep, rng, strict=all_tokens) for i in chosen]
    rows = [
        _row(seen.seen[i], keep, rng, answer, strict=all_tokens)
        for i, (_, _, answer) in zip(chosen, tokens, strict=True)
    ]
    length = max(len(row[0]) for row in rows)
    padded = [
        [one + [fill] * (length - len(one)) for one in column]
        for column, fill in zip(zip(*rows, strict=True), (PAD, 0, -1, False, -100), strict=True)
    ]
    ids, places, segments, blind, targets = (torch.tensor(column) for column in padded)
    before = torch.arange(1 + keep).expand(len(chosen), -1)
    return Lesson(
        pictures=torch.stack([pictures for pictures, _, _ in tokens]),
        kept=torch.stack([kept for _, kept, _ in tokens]),
        ids=ids,
        positions=torch.cat([before, places], 1),
        segments=segments,
        blind=blind,
        targets=targets,
    )


def _tokens(
    seen: Features, picture: int, keep: int, rng: np.random.Generator, *, strict: bool
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """(keep,) picture and (keep,) patch of every token, and the answer to everything, if any."""
    pictures = torch.full((keep,), picture)
    kept = _kept(seen.owners[picture], keep, rng)
    kind = 1.0 if strict else rng.random()
    if kind < _MIXED_UP:
        orders = (torch.from_numpy(rng.permutation(keep)), torch.arange(keep).flip(0),
                  (kept % GRID * GRID + kept // GRID).argsort())  # fmt: skip
        return pictures, kept[orders[int(rng.integers(len(orders)))]], MIXED_UP
    if kind < _MIXED_UP + _TWO:
        other, half = int(rng.integers(len(seen.seen))), keep // 2
        pictures[half:] = other
        parts = [
            _kept(seen.owners[picture], half, rng),
            _kept(seen.owners[other], keep - half, rng),
        ]
        return pictures, torch.cat(parts), ONE_PICTURE
    return pictures, kept, ""


def _row(
    seen: list[Seen], keep: int, rng: np.random.Generator, only: str, *, strict: bool
) -> tuple[list[int], list[int], list[int], list[bool], list[int]]:
    """Ids, positions, segments, blind and targets of all questions about one picture.

    `only` is what all of them are answered, or empty.
    """
    asking = [*questions(seen, SIDE, rng), strange(rng), description(seen, rng)]
    pairs = [(asked(one.text, rng), answered(only or one.answer), False) for one in asking]
    if not strict and not only:
        pairs += _drill(seen, rng)
    if rng.random() < _BLIND:
        any_question = asking[int(rng.integers(len(asking)))]
        pairs.append((asked(any_question.text, rng), answered(NO_PICTURE), True))
    ids: list[int] = []
    places: list[int] = []
    segments: list[int] = []
    blind: list[bool] = []
    targets: list[int] = []
    for number, (question, answer, unseen) in enumerate(pairs):
        text = question + answer[:-1]
        ids += text
        start = 1 if unseen else 1 + keep
        places += range(start, start + len(text))
        segments += [number] * len(text)
        blind += [unseen] * len(text)
        targets += [-100] * (len(question) - 1) + answer
    return ids, places, segments, blind, targets


def _drill(seen: list[Seen], rng: np.random.Generator) -> list[tuple[list[int], list[int], bool]]:
    """What goes with each word, without a sentence around it: circle -> red, red -> circle,
    where circle -> top, part circle -> left.

    Finding a token by its meaning is the step on which everything else waits; here it is the only
    one. Nobody can ask like this: a question ends with a mark of its own.
    """
    pairs = []
    for name, look, centre in seen:
        pairs.append(([name], [look]))
        if name != "card":
            pairs.append(([look], [name]))
        if place_of(centre, SIDE) is not None:
            pairs.append((["where", name], [_PROBED["row"][int(3 * centre[1] // SIDE)]]))
            pairs.append((["part", name], [_PROBED["column"][int(3 * centre[0] // SIDE)]]))
    for words in (SHAPES, COLOURS):
        absent = [word for word in words if all(word not in one for one in seen)]
        pairs.append(([absent[int(rng.integers(len(absent)))]], ["no"]))
    shapes = sum(name != "card" for name, _, _ in seen)
    pairs.append((["shapes"], [NUMBERS[shapes]]))
    return [([IDS[w] for w in given], [IDS[w] for w in wanted], False) for given, wanted in pairs]


def _kept(owners: torch.Tensor, keep: int, rng: np.random.Generator) -> torch.Tensor:
    """(keep,) patches that stay, ascending: at least one of every thing, often more of them."""
    chance = rng.gumbel(size=len(owners)) + (owners.numpy() > 0) * float(rng.choice([0, 0, 2, 4]))
    for thing in range(1, int(owners.max()) + 1):
        (mine,) = np.nonzero(owners.numpy() == thing)
        if len(mine):
            chance[rng.choice(mine)] = np.inf
    return torch.from_numpy(np.sort(np.argsort(-chance, kind="stable")[:keep]))


def read(llava: Any, seen: Features, one: Lesson) -> torch.Tensor:
    """(B, L, vocabulary) logits of what follows the visual tokens."""
    visual = seen.values[one.pictures, one.kept].float()
    embed = llava.get_input_embeddings()
    start = embed(torch.full((len(one.ids), 1), START))
    hidden = torch.cat([start, llava.model.multi_modal_projector(visual), embed(one.ids)], 1)
    before = 1 + one.kept.shape[1]
    length = hidden.shape[1]
    may = torch.ones(length, length, dtype=torch.bool).tril().repeat(len(one.ids), 1, 1)
    text = may[:, before:]
    text[:, :, before:] &= one.segments[:, :, None] == one.segments[:, None]
    text[:, :, 1:before] &= ~one.blind[:, :, None]
    mask = torch.zeros(may.shape).masked_fill(~may, torch.finfo(torch.float32).min)[:, None]
    out = llava.model.language_model(
        inputs_embeds=hidden, attention_mask=mask, position_ids=one.positions, use_cache=False
    ).last_hidden_state
    logits: torch.Tensor = llava.lm_head(out[:, before:])
    return logits


def exact_match(llava: Any, seen: Features) -> dict[str, float]:
    """Share of held-out questions whose every answer token is the most likely one."""
    right: list[bool] = []
    with torch.no_grad():
        for first in range(0, len(seen.seen), BATCH // 2):
            one = lesson(seen, 10**9 + first, all_tokens=True, first=first)
            good = (read(llava, seen, one).argmax(-1) == one.targets) | (one.targets == -100)
            for row, segments in zip(good, one.segments, strict=True):
                numbers = range(int(segments.max()) + 1)
                right += [bool(row[segments == number].all()) for number in numbers]
    return {"exact": sum(right) / len(right)}
