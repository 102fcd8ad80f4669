"""The output block run for kept rows only, on a block made like those of the encoders."""

import gc
import weakref

import pytest
import torch
from torch import nn

from hiprune_vllm.models.last_block import (
    Kept,
    kept_after,
    kept_of_all,
    kept_only,
    put_off,
    set_aside,
)

WIDTH, HEADS = 16, 2


class Attention(nn.Module):
    """Called like vLLM's encoder attention; the name of its backend decides who computes what."""

    def __init__(self, backend):
        super().__init__()
        self.attn_backend = type("Backend", (), {"name": backend})
        self.queries = []

    def forward(self, query, key, value, cu_seqlens=None):
        self.queries.append(query.shape[1])
        flat = query.dim() == 3
        q, k, v = (x.unflatten(-1, (HEADS, -1)) if flat else x for x in (query, key, value))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return out.flatten(2) if flat else out


class Block(nn.Module):
    def __init__(self, backend="TORCH_SDPA", *, attends=True):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.qkv.register_forward_hook(  # a linear layer of vLLM's returns its bias, too
            lambda _, args, out: out if isinstance(out, tuple) else (out, None)
        )
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH))
        self.attn, self.attends = Attention(backend), attends

    @property
    def projections(self):
        return [self.qkv]

    def made(self, x):
        made, _ = self.qkv(x)
        return made.chunk(3, dim=-1)

    def forward(self, x, turn=1.0):
        if self.attends:
            query, key, value = self.made(self.norm1(x))
            x = x + self.out(self.attn(query * turn, key, value))
        return x + self.mlp(self.norm2(x))


class ThreeProjections(Block):
    """Plain linear layers, as in InternS1's tower."""

    def __init__(self, backend="TORCH_SDPA"):
        super().__init__(backend)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    @property
    def projections(self):
        return [self.q, self.k, self.v]

    def made(self, x):
        return self.q(x), self.k(x), self.v(x)


@pytest.fixture
def states():
    return torch.randn(3, 10, WIDTH, generator=torch.Generator().manual_seed(0))


ROWS = [torch.tensor([0, 4, 9]), torch.tensor([5]), torch.arange(10)]


def shortened(block, choose=None, **options):
    kept = [Kept(i * 10, (i + 1) * 10, rows) for i, rows in enumerate(ROWS)]
    return kept_only(
        block,
        block.projections,
        block.attn,
        choose or (lambda: kept),
        within_images=True,
        **options,
    )


@pytest.mark.parametrize("kind", [Block, ThreeProjections])
@pytest.mark.parametrize("backend", ["TORCH_SDPA", "FLASH_ATTN"])
@torch.no_grad()
def test_kept_rows_are_what_the_whole_block_makes_of_them(backend, kind, states):
    block = kind(backend)
    whole = block(states)
    block.attn.queries.clear()
    with shortened(block):
        few = block(states)
    expected = torch.cat([image[rows] for image, rows in zip(whole, ROWS, strict=True)])
    assert few.shape == (1, 14, WIDTH)
    torch.testing.assert_close(few[0], expected, rtol=1e-5, atol=1e-6)
    # Only PyTorch's own kernel is asked for fewer queries than keys.
    assert block.attn.queries == ([3, 1, 10] if backend == "TORCH_SDPA" else [10])


@torch.no_grad()
def test_spare_rows_come_first(states):
    block = Block()
    whole = block(states, turn=3.0)
    with shortened(block, spare_rows=2):
        few = block(states, turn=3.0)
    expected = torch.cat([image[rows] for image, rows in zip(whole, ROWS, strict=True)])
    assert few.shape == (1, 16, WIDTH)
    torch.testing.assert_close(few[0, 2:], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_arguments_with_a_row_for_each_row_are_cut_with_them(states):
    block, turn = Block(), torch.randn(10, 1, generator=torch.Generator().manual_seed(1))
    whole = block(states[:1], turn=turn)
    with shortened(block, lambda: [Kept(0, 10, ROWS[0])], by_row=("turn",)):
        few = block(states[:1], turn=turn)
    torch.testing.assert_close(few, whole[:, ROWS[0]], rtol=1e-5, atol=1e-6)
    with shortened(block, lambda: [Kept(0, 10, ROWS[0])], by_row=("turn",)):
        assert torch.equal(block(states[:1], turn), few)  # wherever it stands in the call


@torch.no_grad()
def test_rows_without_a_batch_stay_so(states):
    kept = [Kept(0, 6, torch.tensor([0, 5])), Kept(6, 10, torch.tensor([1]))]
    block = nn.Identity()
    with kept_after(block, lambda: kept):
        assert torch.equal(block(states[0]), states[0][[0, 5, 7]])


@torch.no_grad()
def test_what_is_set_aside_leaves_rows_without_columns(states):
    module = nn.Linear(WIDTH, 3)
    with set_aside(module) as made:
        stand_in = module(states[:1])
    assert stand_in.shape == (1, 10, 0)
    assert [len(part) for part in torch.split(stand_in.squeeze(0), [4, 6])] == [4, 6]
    assert torch.equal(made[0], module(states[:1]))
    assert "forward" not in vars(module)


@torch.no_grad()
def test_what_is_put_off_is_made_of_the_kept_rows_alone(states):
    states = states[0][:, None]  # (rows, 1, width)
    first, second = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 5)
    kept = [Kept(0, 6, torch.tensor([0, 5])), Kept(6, 10, torch.tensor([1]))]
    rows = [0, 5, 7]
    with put_off([first, second], 3) as made:
        for module in (first, second):
            assert module(states).shape == (3, 0)
    for module, got in zip((first, second), made(kept), strict=True):
        torch.testing.assert_close(got, module(states)[rows])
        assert "forward" not in vars(module)
    # Behind the last block the kept rows come by themselves.
    with put_off([first], 3) as made:
        first(states[rows])
    torch.testing.assert_close(made(kept)[0], first(states[rows]))
    with put_off([first], 3) as made:
        pass
    assert made(kept) == []


class Encoder(nn.Module):
    """Returns the hidden states behind all blocks, as SigLIP's where several are wanted."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, states):
        found = [states]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return found


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_hidden_states_of_earlier_blocks_have_the_kept_rows_too(states, whole, spare):
    encoder, kept = Encoder(), []
    every = encoder(states)

    def choose():
        kept.extend(Kept(i * 10, (i + 1) * 10, rows) for i, rows in enumerate(ROWS))
        return kept

    block = encoder.layers[-1]
    ending = (
        kept_after(block, choose, spare_rows=spare)
        if whole
        else shortened(block, choose, spare_rows=spare)
    )
    with ending, kept_of_all(encoder, kept, spare_rows=spare):
        few = encoder(states)
    assert len(few) == len(every)
    for got, of_all in zip(few, every, strict=True):
        expected = torch.cat([image[rows] for image, rows in zip(of_all, ROWS, strict=True)])
        assert got.shape == (1, spare + 14, WIDTH)
        torch.testing.assert_close(got[0, spare:], expected, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, encoder(states), every))


@torch.no_grad()
def test_nothing_is_chosen_before_queries_and_keys_were_seen(states):
    block, order = Block(), []
    block.attn.register_forward_pre_hook(lambda *_: order.append("seen"))

    def choose():
        order.append("chosen")
        return [Kept(0, 10, ROWS[0])]

    with shortened(block, choose):
        block(states)
    assert order[:2] == ["seen", "chosen"]


@torch.no_grad()
def test_the_block_is_itself_again_also_after_an_error(states):
    block = Block()
    whole = block(states)

    def fail():
        raise ValueError("no scores")

    with pytest.raises(ValueError, match="no scores"), shortened(block, fail):
        block(states)
    assert torch.equal(block(states), whole)
    for module in block.modules():
        assert "forward" not in vars(module)


@torch.no_grad()
def test_a_block_that_calls_no_attention_is_an_error_not_a_wrong_answer(states):
    block = Block(attends=False)
    with pytest.raises(RuntimeError, match="version drift"), shortened(block):
        block(states)


@torch.no_grad()
def test_no_tensor_of_the_block_outlives_it(states):
    """Without the garbage collector: a cycle would hold gigabytes until it runs."""
    block, alive = Block(), []
    block.attn.register_forward_pre_hook(lambda _, args: alive.append(weakref.ref(args[0])))
    gc.disable()
    try:
        with shortened(block):
            block(states)
        assert alive[0]() is None
    finally:
        gc.enable()
