import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiprune_vllm.pruning import scores
from hiprune_vllm.pruning.scores import attention_received
from tests.reference import paper


def random_qk(seed, batch, tokens, heads, width):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, heads, width)
    return (3 * torch.randn(shape, generator=generator) for _ in range(2))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    heads=st.integers(1, 4),
    block=st.integers(1, 3000),
    has_cls=st.booleans(),
    cls_only=st.booleans(),
)
def test_column_sums_equal_the_full_attention_for_every_block_size(
    seed, batch, tokens, heads, block, has_cls, cls_only
):
    query, key = random_qk(seed, batch, tokens, heads, 8)
    received = attention_received(
        query, key, 8**-0.5, from_first_only=cls_only, block_elements=block
    )
    assert received.shape == (batch, tokens)
    assert received.dtype == torch.float32
    for image in range(batch):
        full = paper.attention(query[image].transpose(0, 1), key[image].transpose(0, 1))
        expected = paper.scores(full, has_cls=has_cls, cls_only=cls_only)
        got = (received[image] / heads)[int(has_cls) :]
        torch.testing.assert_close(got, torch.tensor(expected), rtol=2e-5, atol=2e-6)


def test_attention_paid_adds_up_to_one_a_token_and_head():
    query, key = random_qk(0, 2, 50, 4, 16)
    received = attention_received(query, key, 0.25)
    torch.testing.assert_close(received.sum(dim=1), torch.full((2,), 50.0 * 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_inputs_are_scored_in_fp32(dtype):
    query, key = (x.to(dtype) for x in random_qk(1, 1, 30, 2, 8))
    expected = attention_received(query.float(), key.float(), 0.3)
    torch.testing.assert_close(attention_received(query, key, 0.3), expected)


def test_inputs_are_not_changed():
    query, key = random_qk(2, 2, 20, 2, 8)
    before = query.clone(), key.clone()
    attention_received(query, key, 0.3)
    assert torch.equal(query, before[0])
    assert torch.equal(key, before[1])


def test_memory_is_bounded_by_the_block_not_by_the_image(monkeypatch):
    """Watches every tensor that is made: none comes near H x T x T."""
    tokens, heads, block = 2048, 4, 1 << 16
    query, key = random_qk(3, 1, tokens, heads, 8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // 4)
            return result

    with Watch():
        attention_received(query, key, 0.3, block_elements=block)
    inputs = query.numel()
    assert largest <= max(block, inputs)
    assert largest < heads * tokens * tokens // 100
    assert scores.BLOCK_ELEMENTS * 4 == 16 << 20


def test_an_accelerator_gets_several_heads_at_a_time():
    """No device is here to work on; shapes are what PyTorch's own stand-in for one knows."""
    q = torch.empty(2, 9, 4, 8, device="meta")
    received = attention_received(q, q, 1.0, block_elements=9 * 9 * 4)
    assert received.shape == (2, 9)
    assert received.dtype == torch.float32


def test_the_default_object_layer_is_a_share_of_the_depth():
    assert scores.default_object_layer(24, merging=False) == 9
    assert scores.default_object_layer(32, merging=True) == 16
    assert scores.default_object_layer(1, merging=False) == 1
