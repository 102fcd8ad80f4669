"""What a worker remembers of a picture, and by what: nobody can steer it into a wrong picture."""

import os
import subprocess
import sys

import pytest
import torch

from hiprune_vllm.engine import secret
from hiprune_vllm.models.images import Image, Part, Selection
from hiprune_vllm.pruning.budget import BUDGET_INTS, ImageBudget
from hiprune_vllm.pruning.select import Region


def budget(keep, full=576):
    return ImageBudget.of(
        full, keep, method="hiprune", alpha=0.1, buffer="cross", object_layer=3, score="global"
    )


def test_a_key_is_the_whole_digest_and_needs_the_servers_secret(monkeypatch):
    monkeypatch.setenv(secret.VARIABLE, "ours")
    key = secret.keyed("a" * 64, [1, 2])
    assert len(key) == 4
    assert all(-(2**63) <= word < 2**63 for word in key)
    assert torch.tensor(key, dtype=torch.int64).tolist() == list(key)
    others = [secret.keyed("a" * 63 + "b", [1, 2]), secret.keyed("a" * 64, [12])]
    monkeypatch.setenv(secret.VARIABLE, "another server's")
    others.append(secret.keyed("a" * 64, [1, 2]))
    for other in others:
        assert not set(other) & set(key)


def test_identities_of_any_text_have_a_key(monkeypatch):
    monkeypatch.delenv(secret.VARIABLE, raising=False)
    keys = {secret.keyed(text, [1]) for text in ("", "é \n", "a" * 10**5, "1 2", "1  2")}
    assert len(keys) == 5


def test_a_row_carries_budget_and_key():
    from hiprune_vllm.engine.wire import pack_item, unpack_item

    one = budget(64)
    assert len(one.to_ints()) == BUDGET_INTS
    row = torch.tensor([pack_item(one, "identity")]).tolist()[0]
    assert unpack_item(row) == (one, secret.keyed("identity", one.to_ints()))


def test_all_processes_of_a_server_have_one_secret_and_an_operators_stays():
    code = (
        "import os, subprocess, sys; from hiprune_vllm.engine import secret; secret.share();"
        "print(os.environ[secret.VARIABLE]);"
        "sys.stdout.flush();"
        "sys.argv[1:] and subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    )

    def secrets(**given):
        environment = {k: v for k, v in os.environ.items() if k != secret.VARIABLE} | given
        told = subprocess.run(
            [sys.executable, "-c", code, code],
            env=environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        return told.stdout.split()

    (parent, child), (other, _) = secrets(), secrets()
    assert parent == child
    assert len(parent) == 64
    assert parent != other
    assert secrets(**{secret.VARIABLE: "mine"}) == ["mine", "mine"]


WHOLE = Region(0, 24, 0, 24)
PARTS = (Part(0, 576, WHOLE, 64), Part(2, 576, Region(3, 9, 0, 24), 30))


@pytest.mark.parametrize(
    "other",
    [
        (),
        PARTS[:1],
        (*PARTS, Part(3, 576, WHOLE, 1)),
        (PARTS[0], PARTS[1]._replace(keep=31)),
        (PARTS[0], PARTS[1]._replace(number=3)),
        (PARTS[0], PARTS[1]._replace(region=Region(3, 8, 0, 24))),
        (PARTS[0]._replace(full=256, region=Region(0, 16, 0, 16)), PARTS[1]),
    ],
    ids=["none", "fewer", "more", "count", "tile", "region", "grid"],
)
def test_a_selection_from_other_parts_is_a_miss(other):
    kept = tuple(torch.arange(part.keep) for part in PARTS)
    image = Image(budget(94), Selection(PARTS, kept))
    assert image.known_of(PARTS) == kept
    assert image.known_of(other) is None
    assert Image(budget(94)).known_of(PARTS) is None
