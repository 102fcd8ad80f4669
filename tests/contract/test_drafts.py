"""Drafts beside 3-D positions, by the proposer of vLLM's older model runner."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from hiprune_vllm.engine.drafts import places, tell_places_from_positions
from tests.reference.kernels import kernels_found

STOCK = {
    name: inspect.unwrap(getattr(SpecDecodeBaseProposer, name))
    for name in ("set_inputs_first_pass", "_update_positions_dependent_metadata")
}
BLOCK, LONGEST, ROWS = 4, 64, 100
TABLE = torch.arange(100, 100 + 3 * LONGEST // BLOCK).view(3, -1).int()
"""Blocks of three requests."""


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    """As the CPU engine's worker has them; on a GPU Triton's own."""
    with kernels_found():
        current_platform.register_triton_kernel_overrides()


@pytest.fixture
def proposer(monkeypatch):
    """vLLM's class with what we change, and what it had before again behind the test."""
    for name, method in STOCK.items():
        monkeypatch.setattr(SpecDecodeBaseProposer, name, method)
    tell_places_from_positions()
    changed = SpecDecodeBaseProposer.set_inputs_first_pass
    tell_places_from_positions()
    assert SpecDecodeBaseProposer.set_inputs_first_pass is changed  # once
    return SpecDecodeBaseProposer


def a_draft(*, uses_mrope, slots=False):
    text = SimpleNamespace(max_position_embeddings=ROWS // 4 if uses_mrope else ROWS)
    draft = SimpleNamespace(
        uses_mrope=uses_mrope, hf_config=SimpleNamespace(get_text_config=lambda: text)
    )
    return SimpleNamespace(
        needs_extra_input_slots=slots,
        uses_mrope=uses_mrope,
        mrope_positions=torch.zeros(3, 9, dtype=torch.int64),
        positions=torch.zeros(8, dtype=torch.int64),
        max_model_len=LONGEST,
        _slot_mapping_buffer=torch.zeros(8, dtype=torch.int64),
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(uses_mrope=True)),
        draft_model_config=draft,
    )


def a_step(lengths):
    return SimpleNamespace(
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table_tensor=TABLE[: len(lengths)],
        slot_mapping=None,
        max_seq_len=max(lengths),
        seq_lens_cpu_upper_bound=None,
    )


@pytest.mark.parametrize("uses_mrope", [True, False])
def test_a_drafts_next_token_goes_to_its_place_and_turns_by_its_position(proposer, uses_mrope):
    draft, step = a_draft(uses_mrope=uses_mrope), a_step([10, 33, LONGEST])
    # Far behind their places, as behind a pruned picture; the second at the end of the table.
    now = torch.tensor([40, ROWS - 1, 70])
    now = now.repeat(3, 1) if uses_mrope else now
    for more in (1, 2):
        now = proposer._update_positions_dependent_metadata(draft, now, step, 3, 3, BLOCK)
        rows = now if uses_mrope else now[None]
        assert rows[:, :2].tolist() == [[40 + more, ROWS - 1]] * len(rows)
        assert rows.max() < ROWS
        slots = [
            int(TABLE[request, place // BLOCK]) * BLOCK + place % BLOCK
            for request, place in ((0, 9 + more), (1, 32 + more))
        ]
        assert step.slot_mapping[:2].tolist() == slots
        if more == 1:  # no room for the third
            assert (rows[0, 2], step.slot_mapping[2]) == (0, -1)


def test_a_model_without_3d_positions_is_left_alone(proposer):
    draft, step = a_draft(uses_mrope=False), a_step([10, 33])
    draft.vllm_config.model_config.uses_mrope = False
    now = torch.tensor([9, 32])
    found = proposer._update_positions_dependent_metadata(draft, now, step, 2, 2, BLOCK)
    assert found.tolist() == [10, 33]


def first_pass(monkeypatch, draft, positions, step):
    """Positions that vLLM's own first pass gets."""
    seen = []

    def noting(self, **given):
        seen.append(given["target_positions"])

    for name, method in {**STOCK, "set_inputs_first_pass": noting}.items():
        monkeypatch.setattr(SpecDecodeBaseProposer, name, method)
    tell_places_from_positions()
    SpecDecodeBaseProposer.set_inputs_first_pass(draft, target_positions=positions, cad=step)
    return seen[0].tolist()


def test_what_a_draft_begins_with(monkeypatch):
    named = inspect.signature(STOCK["set_inputs_first_pass"]).parameters
    assert {"target_positions", "cad"} <= named.keys()
    step = SimpleNamespace(query_start_loc=torch.tensor([0, 3, 5]), seq_lens=torch.tensor([10, 2]))
    assert places(step, 5).tolist() == [7, 8, 9, 0, 1]
    positions = torch.tensor([[40, 41, ROWS + 7, 0, 1]] * 3)
    inside = [[40, 41, ROWS - 1, 0, 1]] * 3
    for uses_mrope in (True, False):  # a head: inside of the table that it has
        draft = a_draft(uses_mrope=uses_mrope)
        assert first_pass(monkeypatch, draft, positions, step) == inside
    text_only = a_draft(uses_mrope=False, slots=True)  # a model of its own: the places
    assert first_pass(monkeypatch, text_only, positions, step) == [7, 8, 9, 0, 1]
    assert first_pass(monkeypatch, text_only, positions[0], step) == positions[0].tolist()
