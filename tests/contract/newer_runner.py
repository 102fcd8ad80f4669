"""Parts of vLLM's newer model runner between a schedule and a model's inputs, on the CPU.

To be used in a process where Triton's kernels are interpreted (`INTERPRETED_KERNELS`).
"""

from types import SimpleNamespace

import torch

WIDTH, COLUMNS = 8, 7
TEXT, IMAGE, VIDEO = 1, 7, 9
LENGTH, REQUESTS, TOKENS = 96, 8, 64


def pretend():
    """What vLLM's own CPU worker puts in the place of CUDA's streams, events and memory."""
    from vllm.triton_utils import HAS_TRITON
    from vllm.utils import torch_utils

    torch_utils.PIN_MEMORY = False
    import vllm.v1.worker.cpu.shm  # noqa: F401

    assert HAS_TRITON


def pictures(*found):
    """Features of a request's pictures: (name, offset, kept tokens or None, rows, columns)."""
    from vllm.multimodal.inputs import (
        MultiModalFeatureSpec,
        MultiModalFieldConfig,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    from hiprune_vllm.engine.wire import BUDGET_FIELD, pack_item
    from hiprune_vllm.pruning.budget import ImageBudget

    features = []
    for number, offset, kept, rows, columns in found:
        full = rows * columns
        keep = full if kept is None else len(kept)
        budget = ImageBudget.of(
            full, keep, method="hiprune", alpha=0.1, buffer="cross", object_layer=1, score="global"
        )
        on_cpu = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        fields = {
            BUDGET_FIELD: (torch.tensor([pack_item(budget, str(number))]), on_cpu),
            "image_grid_thw": (torch.tensor([[1, rows * 2, columns * 2]]), on_cpu),
            "pixel_values": (
                torch.full((1, 4), float(number)),
                MultiModalFieldConfig.batched("image"),
            ),
        }
        item = {
            name: config.build_elems(name, tensor)[0] for name, (tensor, config) in fields.items()
        }
        place = PlaceholderRange(offset=offset, length=keep)
        features.append(
            MultiModalFeatureSpec(
                MultiModalKwargsItem(item), "image", f"picture {number}", place, "not the key"
            )
        )
    return features


def a_model(known):
    """Our model around a tower that knows what is kept of every picture.

    Args:
        known: by number, kept tokens (None for all), rows and columns.
    """
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    from hiprune_vllm.engine.positions import PrunedMRopeModel
    from hiprune_vllm.engine.wire import BUDGET_FIELD
    from hiprune_vllm.pruning.positions import encode_positions, no_positions

    class OfVllm(torch.nn.Module):
        iter_mm_grid_thw = Qwen2_5_VLForConditionalGeneration.iter_mm_grid_thw
        get_mrope_input_positions = Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions

    class StandIn(PrunedMRopeModel, OfVllm):
        supports_mrope = True

        def __init__(self):
            torch.nn.Module.__init__(self)
            self.visual = SimpleNamespace(out_hidden_size=WIDTH)
            vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
            self.config = SimpleNamespace(
                image_token_id=IMAGE, video_token_id=VIDEO, vision_config=vision
            )
            self.batches = []

        def embed_multimodal(self, **kwargs):
            self.batches.append(kwargs)
            if "pixel_values_videos" in kwargs:
                videos = kwargs["pixel_values_videos"].flatten(1)[:, :1].expand(-1, WIDTH)
                return [torch.cat([row[None], no_positions(1, row)], dim=1) for row in videos]
            assert kwargs[BUDGET_FIELD].device.type == "cpu"
            embeddings = []
            for number in kwargs["pixel_values"].flatten(1)[:, 0].long().tolist():
                kept, rows, columns = known[number]
                rows_ = a_picture(number, rows * columns if kept is None else len(kept))
                place = (
                    no_positions(len(rows_), rows_)
                    if kept is None
                    else encode_positions(torch.tensor(kept), columns, rows_.dtype)
                )
                embeddings.append(torch.cat([rows_, place], dim=1))
            return embeddings

        def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
            found = -input_ids[:, None].float().expand(-1, WIDTH).clone()
            if multimodal_embeddings:
                found[is_multimodal] = torch.cat(multimodal_embeddings)
            else:
                assert is_multimodal is None or not is_multimodal.any()
            return found

    return StandIn()


def a_picture(number, tokens):
    """What the tower makes of a picture."""
    return (number * 1000 + torch.arange(tokens))[:, None].float().expand(-1, WIDTH)


def a_config(ours=True):
    from vllm.config import MultiModalConfig

    from hiprune_vllm.engine.compat import carry_positions_with_embeddings

    model = SimpleNamespace(
        hf_config=None,  # the family of the stand-in does not ask
        multimodal_config=MultiModalConfig(),
        uses_mrope=True,
        mrope_num_dims=3,
        get_inputs_embeds_size=lambda: WIDTH,
        dtype=torch.float32,
        enable_prompt_embeds=False,
        max_model_len=LENGTH,
        enforce_eager=True,
    )
    config = SimpleNamespace(
        model_config=model,
        scheduler_config=SimpleNamespace(max_num_seqs=REQUESTS, max_num_batched_tokens=TOKENS),
        compilation_config=SimpleNamespace(cudagraph_mm_encoder=False),
        observability_config=None,
    )
    if ours:
        carry_positions_with_embeddings(config)
    return config


class Runner:
    """As much of the newer runner as stands between a schedule and the model's inputs."""

    def __init__(self, known):
        from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState
        from vllm.v1.worker.gpu.states import RequestState

        self.model, self.cache = a_model(known), EncoderCache()
        self.state = DefaultModelState(a_config(), self.model, self.cache, torch.device("cpu"))
        self.requests = RequestState(
            max_num_reqs=REQUESTS, max_model_len=LENGTH, max_num_batched_tokens=TOKENS,
            num_speculative_steps=0, vocab_size=100, device=torch.device("cpu"),
        )  # fmt: skip

    def add(self, name, ids, features, *, prompt=None, computed=0):
        self.requests.add_request(name, prompt or len(ids), ids, computed, 9)
        self.cache.add_request(name, features)
        new = SimpleNamespace(prefill_token_ids=ids, mm_features=features)
        self.state.add_request(self.requests.req_id_to_index[name], new)
        self.requests.apply_staged_writes()
        self.state.apply_staged_writes()

    def remove(self, name):
        self.requests.remove_request(name)
        self.cache.remove_request(name)

    def step(self, scheduled, decoded=None):
        """Inputs of a step for the model, and embeddings for a draft, by request.

        Args:
            scheduled: tokens by request, in the order of the batch.
            decoded: by request, token that it has got.
        """
        index = [self.requests.req_id_to_index[name] for name in scheduled]
        lengths = torch.tensor(list(scheduled.values()), dtype=torch.int32)
        starts = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
        computed = self.requests.num_computed_tokens_np[index]
        prefill = self.requests.prefill_len.np[index]
        ids, encoder = [], {}
        for name, at, count, row in zip(
            scheduled, computed.tolist(), lengths.tolist(), index, strict=True
        ):
            known = self.requests.all_token_ids.gpu[row].tolist()
            length = int(self.requests.prefill_len.np[row])
            end = at + count
            ids += known[at:end] if end <= length else [decoded[name]]
            encoder[name] = [
                i
                for i, one in enumerate(self.cache.mm_features[name])
                if one.mm_position.offset < end
                and one.mm_position.offset + one.mm_position.length > at
                and one.identifier not in self.cache.encoder_outputs
            ]
        batch = SimpleNamespace(
            req_ids=list(scheduled),
            idx_mapping=torch.tensor(index),
            idx_mapping_np=torch.tensor(index).numpy(),
            num_tokens=len(ids),
            num_tokens_after_padding=len(ids) + 3,
            num_scheduled_tokens=lengths.numpy(),
            query_start_loc=starts,
            query_start_loc_np=starts.numpy(),
            prefill_len_np=prefill,
            num_computed_prefill_tokens_np=computed.clip(max=prefill),
            num_computed_tokens_np=computed,
            input_ids=torch.tensor([*ids, 0, 0, 0]),
        )
        embeds = self.state.prepare_inputs_embeds(encoder, batch, self.requests)
        positions = self.state.prepare_inputs(batch, self.requests)["positions"]
        draft, _ = self.state.gather_mm_embeddings(batch, draft_lookahead=1)
        found = {}
        for name, start, stop, row in zip(scheduled, starts[:-1], starts[1:], index, strict=True):
            found[name] = positions[:, start:stop].clone(), embeds[start:stop].clone()
            done = int(self.requests.num_computed_tokens_np[row] + stop - start)
            self.requests.num_computed_tokens_np[row] = done
            self.requests.num_computed_tokens.stage_write_elem(row, done)
        self.requests.num_computed_tokens.apply_write()
        return found, draft


PARTS = ([2, 5, 6, 9, 11], 3, 4), ([0], 2, 2), (None, 2, 3), ([1, 2, 7], 4, 2), (None, 1, 2)
"""Kept tokens, rows and columns of every picture."""


def a_prompt(parts, tail, first=0):
    """Token ids, features and positions of a prompt with these pictures.

    Args:
        parts: (text tokens before it, number of a picture) in order.
        tail: text tokens behind them.
    """
    ids, found, positions, position = [], [], [], first
    for text, number in parts:
        positions += [[position + i] * 3 for i in range(text)]
        ids += [TEXT] * text
        position += text
        kept, rows, columns = PARTS[number]
        found.append((number, len(ids), kept, rows, columns))
        for place in range(rows * columns) if kept is None else kept:
            positions.append([position, position + place // columns, position + place % columns])
            ids.append(IMAGE)
        position += max(rows, columns)
    positions += [[position + i] * 3 for i in range(tail)]
    return ids + [TEXT] * tail, pictures(*found), torch.tensor(positions).T


def embedded(ids, features):
    """What the language model has to see of a prompt."""
    rows = -torch.tensor(ids)[:, None].float().expand(-1, WIDTH).clone()
    for one in features:
        start, length = one.mm_position.offset, one.mm_position.length
        rows[start : start + length] = a_picture(int(one.identifier.split()[1]), length)
    return rows
