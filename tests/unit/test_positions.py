import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiprune_vllm.pruning.positions import (
    COLUMNS,
    LARGEST,
    decode_positions,
    encode_positions,
    no_positions,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(
    places=st.lists(st.tuples(st.integers(0, LARGEST), st.integers(0, LARGEST)), min_size=1),
    later=st.integers(0, LARGEST),
)
def test_positions_survive_every_dtype_exactly(dtype, places, later):
    columns = LARGEST + 1
    kept = torch.tensor([row * columns + column for row, column in places])
    encoded = encode_positions(kept, columns, dtype, later)
    assert encoded.shape == (len(places), COLUMNS)
    assert encoded.dtype == dtype
    pruned, row, column, time = decode_positions(encoded)
    assert pruned.all()
    assert time.tolist() == [later] * len(places)
    assert list(zip(row.tolist(), column.tolist(), strict=True)) == places


def test_unpruned_tokens_are_marked_as_such():
    pruned, *_ = decode_positions(no_positions(3, torch.zeros(1, dtype=torch.bfloat16)))
    assert pruned.tolist() == [False] * 3
