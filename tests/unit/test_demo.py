"""The demo model: its pictures, its language, and the checkpoint that ships."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from hiprune_server import demo
from hiprune_server.demo import language
from hiprune_server.demo.world import HELD_OUT, PATCH, scene
from tools.demo_training import encoder, progress, text, words

MEGABYTE = 1_000_000


def test_a_seed_gives_the_same_scene_every_time():
    first, again, other = scene(5), scene(5), scene(6)
    assert np.array_equal(first.picture, again.picture)
    assert first.things == again.things
    assert first.questions() == again.questions()
    assert not np.array_equal(first.picture, other.picture)


@pytest.mark.parametrize("seed", range(12))
def test_a_scene_is_what_it_says(seed):
    one = scene(HELD_OUT + seed)
    shapes = [thing for thing in one.things if thing.name != "card"]
    assert one.picture.size == (336, 336)
    assert 1 <= len(shapes) <= 4
    assert len({thing.name for thing in one.things}) == len(one.things)
    assert len({thing.look for thing in shapes}) == len(shapes)
    for number, thing in enumerate(one.things, 1):
        left, top, right, bottom = thing.box
        rows, columns = np.nonzero(one.owners == number)
        assert left <= columns.min() <= columns.max() < right
        assert top <= rows.min() <= rows.max() < bottom
        patches = (encoder.owner_of_patches(one) == number).sum()
        assert 2 <= patches <= 20
    assert np.array_equal(one.mask(), one.owners > 0)


def test_labels_point_at_the_things_that_patches_lie_on():
    one = scene(3)
    labels, offsets, whole = encoder.label(one, 0, 0)
    owners = encoder.owner_of_patches(one)
    side = one.picture.width // PATCH
    for patch in np.nonzero(owners)[0]:
        thing = one.things[owners[patch] - 1]
        assert encoder.KINDS[labels["kind"][patch]] == thing.name
        middle = np.array([patch % side + 0.5, patch // side + 0.5]) * PATCH
        assert np.allclose(middle + offsets[patch].numpy() * PATCH, thing.centre, atol=1e-3)
        row, column = int(labels["row"][patch]), int(labels["column"][patch])
        assert (row, column) == tuple(int(at // 112) for at in thing.centre[::-1])
    assert whole.sum() == len(one.things) + sum(t.name != "card" for t in one.things) + 1


def test_where_something_is_is_asked_only_where_it_is_clear():
    rng = np.random.default_rng(0)
    for x, asked in ((50.0, True), (111.0, False), (168.0, True)):
        seen = [("circle", "red", (x, 50.0))]
        kinds = [
            question.answer
            for _ in range(20)
            for question in language.questions(seen, 336, rng)
            if question.kind == "where" and "no" not in question.answer
        ]
        assert bool(kinds) == asked
        assert {"at the top left" in answer for answer in kinds} <= {x == 50.0}


def test_every_word_has_a_token_and_answers_come_back_as_they_were():
    tokenizer = words.tokenizer()
    rng = np.random.default_rng(0)
    for seed in range(60):
        one = scene(seed)
        for question in [*one.questions(), *one.more_questions(), language.strange(rng)]:
            asked = tokenizer(question.text, add_special_tokens=False)["input_ids"]
            assert words.UNKNOWN_WORD not in asked
            answer = words.answered(question.answer)
            assert answer[-1] == words.END
            assert tokenizer.decode(answer, skip_special_tokens=True) == question.answer
    assert tokenizer("a gnu")["input_ids"][-1] == words.UNKNOWN_WORD


def test_questions_are_tokenized_as_they_were_trained():
    class NeverForgets:
        def random(self):
            return 1.0

    tokenizer = words.tokenizer()
    for question in scene(1).questions():
        expected = words.asked(question.text, NeverForgets())
        messages = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": question.text}],
            }
        ]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids == [words.START, words.IMAGE, *expected]


def test_a_follow_up_question_keeps_the_pictures_and_drops_what_was_said():
    tokenizer = words.tokenizer()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]},
        {"role": "assistant", "content": "I see a red ring."},
        {"role": "user", "content": "Where is the ring?"},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False)
    assert prompt == "<s><image>Where is the ring?<answer>"


def test_a_lesson_keeps_a_patch_of_everything_and_questions_apart():
    seeds = range(12)
    features = text.Features(
        values=torch.zeros(0),
        owners=torch.stack([torch.from_numpy(encoder.owner_of_patches(scene(s))) for s in seeds]),
        seen=[scene(seed).seen() for seed in seeds],
    )
    counted = Counter()
    for step in range(60):
        one = text.lesson(features, step)
        for pictures, kept, targets in zip(one.pictures, one.kept, one.targets, strict=True):
            for picture in set(pictures.tolist()):
                owners = features.owners[picture]
                mine = kept[pictures == picture]
                assert set(owners[mine].tolist()) >= set(owners.tolist()) - {0}
            told = {words.WORDS[i] for i in targets.tolist() if i >= 0}
            alone = len(set(pictures.tolist())) == 1
            if bool((kept.diff() > 0).all()):
                assert alone
                assert "shape" in told
                counted["in order"] += 1
            elif "mixed" in told:
                assert alone
                assert "shape" not in told
                counted["mixed up"] += 1
            else:
                assert {"show", "one"} <= told
                assert "shape" not in told
                counted["two"] += 1
        asked = one.segments >= 0
        assert (one.targets[~asked] == -100).all()
        again = text.lesson(features, step)
        assert (again.ids == one.ids).all()
    assert min(counted[kind] for kind in ("in order", "mixed up", "two")) > 5


def test_an_interrupted_stage_goes_on_where_it_was(tmp_path, capsys):
    def run(stop):
        torch.manual_seed(0)
        module = torch.nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        shown = progress.Progress(tmp_path / str(stop), {"one": 1.0}, save_every_s=0.0)
        first = shown.resume("one", module, optimizer)
        shown.start("one", [1.0] * 20, first)
        for step in range(first, 20):
            if step == stop and first == 0:
                return None
            module(torch.full((1, 2), float(step))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            shown.step(step, {"loss": 0.0}, module, optimizer)
        return module.weight.detach()

    whole = run(99)
    assert run(7) is None
    assert torch.equal(run(7), whole)
    assert "goes on at step 7 of 20" in capsys.readouterr().err


def test_the_shipped_checkpoint_is_small_whole_and_has_its_card():
    sizes = {path.name: path.stat().st_size for path in demo.CHECKPOINT.iterdir()}
    assert sizes["model.safetensors"] <= 12 * MEGABYTE
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(sizes)
    config = json.loads((demo.CHECKPOINT / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 9
    card = (demo.CHECKPOINT / "README.md").read_text()
    assert "says nothing about the accuracy of real models" in card
    shipped = json.loads((demo.CHECKPOINT / "tokenizer.json").read_text())
    assert shipped["model"]["vocab"] == words.IDS


def test_sample_pictures_ship_with_questions():
    told = json.loads((demo.SAMPLES / "questions.json").read_text())
    assert len(told) >= 3
    for name, pairs in told.items():
        assert Image.open(demo.SAMPLES / name).size == (336, 336)
        assert len(pairs) >= 5
