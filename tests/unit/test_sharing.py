"""Images that ranks share out, each of which holds the whole encoder."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiprune_vllm.engine import sharing

sizes = st.lists(st.integers(1, 3000), min_size=1, max_size=12)


@given(sizes=sizes, ranks=st.integers(1, 8))
def test_every_image_is_encoded_once_and_the_work_is_even(sizes, ranks):
    shares = sharing.shares_of(sizes, ranks)
    assert len(shares) == ranks
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    work = [sum(sizes[i] for i in share) for share in shares]
    assert max(work) - min(work) <= max(sizes)


class Ranks:
    """Threads as ranks: what one gathers comes from all."""

    def __init__(self, count):
        self.count, self.sent = count, {}
        self.barrier = threading.Barrier(count, timeout=20)
        self.local = threading.local()

    def gather(self, tensor, dim):
        assert dim == 0
        self.sent[self.local.rank] = tensor
        self.barrier.wait()
        sent = [self.sent[rank] for rank in range(self.count)]
        assert len({one.shape for one in sent}) == 1  # else a real gather would hang or fail
        self.barrier.wait()
        return torch.cat(sent)

    def run(self, function):
        results = [None] * self.count

        def one(rank):
            self.local.rank = rank
            results[rank] = function(rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@settings(deadline=None, max_examples=30)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_all_ranks_get_all_rows_in_the_order_of_the_images(ranks, counts):
    threads = Ranks(ranks)
    shares = sharing.shares_of([count + 1 for count in counts], ranks)
    rows = [torch.full((count, 2), i) for i, count in enumerate(counts)]

    def gathered(rank):
        mine = torch.cat([torch.zeros(0, 2, dtype=torch.int64), *(rows[i] for i in shares[rank])])
        return sharing._gathered(mine, shares, counts)

    original = sharing.tensor_model_parallel_all_gather
    sharing.tensor_model_parallel_all_gather = threads.gather
    try:
        for found in threads.run(gathered):
            assert [one.tolist() for one in found] == [one.tolist() for one in rows]
    finally:
        sharing.tensor_model_parallel_all_gather = original
