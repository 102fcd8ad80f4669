"""The demo model notices wrong tokens: what makes `make eval-quick` a check that can fail.

Hugging Face only, no engine: the right selection stays within the quick evaluation's threshold and
every way to get an index wrong falls below it.
"""

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from hiprune_server import demo
from hiprune_server.demo.world import HELD_OUT, scene
from hiprune_vllm.pruning.budget import anchor_count
from hiprune_vllm.pruning.select import hiprune_indices
from loadtests.quality.__main__ import CLOSE_TO_FULL, FAR_FROM_FULL
from tools.demo_training import words

SIDE = 24
KEEP = 64
PICTURES = 30


@pytest.fixture(scope="module")
def llava():
    return LlavaForConditionalGeneration.from_pretrained(
        demo.CHECKPOINT, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def seen(llava):
    """Per picture: projected tokens (576, 128), HiPrune's 64 indices, prompts and answers."""
    tokenizer = words.tokenizer()
    found = []
    for seed in range(HELD_OUT, HELD_OUT + PICTURES):
        one = scene(seed)
        pixels = torch.from_numpy(np.array(one.picture, dtype=np.float32)).permute(2, 0, 1)
        with torch.no_grad():
            out = llava.model.vision_tower(
                pixels[None] / 127.5 - 1, output_attentions=True, output_hidden_states=True
            )
            tokens = llava.model.multi_modal_projector(out.hidden_states[-2][0, 1:])
        at_object, at_output = (out.attentions[layer - 1].sum(2).mean(1)[:, 1:] for layer in (3, 8))
        kept = hiprune_indices(
            at_object, at_output, keep=KEEP, anchors=anchor_count(KEEP, 0.1, "cross"),
            columns=SIDE, buffer="cross",
        )[0]  # fmt: skip
        pairs = [
            (
                [*tokenizer(q.text, add_special_tokens=False)["input_ids"], words.ANSWER],
                words.answered(q.answer),
            )
            for q in one.questions()
        ]
        found.append((tokens, kept, pairs))
    return found


def accuracy(llava, seen, choose):
    """Share of questions whose whole answer is the most likely one, `choose` giving the indices."""
    embed = llava.get_input_embeddings()
    right = []
    for tokens, kept, pairs in seen:
        visual = tokens[choose(kept)]
        length = max(len(question) + len(answer) for question, answer in pairs)
        rows = [q + a + [words.PAD] * (length - len(q) - len(a)) for q, a in pairs]
        start = embed(torch.tensor([words.START]))
        before = torch.cat([start, visual]).expand(len(rows), -1, -1)
        with torch.no_grad():
            hidden = torch.cat([before, embed(torch.tensor(rows))], 1)
            out = llava.model.language_model(inputs_embeds=hidden).last_hidden_state
            said = llava.lm_head(out[:, before.shape[1] - 1 : -1]).argmax(-1)
        for row, (question, answer) in zip(said.tolist(), pairs, strict=True):
            right.append(row[len(question) : len(question) + len(answer)] == answer)
    return float(np.mean(right))


@pytest.fixture(scope="module")
def full(llava, seen):
    return accuracy(llava, seen, lambda kept: torch.arange(SIDE * SIDE))


def test_the_right_tokens_pass(llava, seen, full):
    assert full >= 0.97
    assert accuracy(llava, seen, lambda kept: kept) >= full - CLOSE_TO_FULL


def test_random_tokens_do_not(llava, seen, full):
    generator = torch.Generator().manual_seed(0)

    def drawn(kept):
        return torch.randperm(SIDE * SIDE, generator=generator)[:KEEP].sort().values

    assert accuracy(llava, seen, drawn) < full - FAR_FROM_FULL


WRONG = {
    "rows and columns exchanged": lambda kept: (kept % SIDE * SIDE + kept // SIDE).sort().values,
    "counted from the other end": lambda kept: (SIDE * SIDE - 1 - kept).sort().values,
    "three rows further down": lambda kept: ((kept + 3 * SIDE) % (SIDE * SIDE)).sort().values,
    "one row further down": lambda kept: ((kept + SIDE) % (SIDE * SIDE)).sort().values,
    "one to the right, as where CLS is counted": lambda kept: (kept + 1) % (SIDE * SIDE),
    "the first tokens": lambda kept: torch.arange(KEEP),
    "in reverse order": lambda kept: kept.flip(0),
    "in the order of their scores": lambda kept: kept[torch.randperm(KEEP)],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tokens_do_not_pass(llava, seen, full, name):
    assert accuracy(llava, seen, WRONG[name]) < full - CLOSE_TO_FULL
