"""What is explained is what is kept: the engine's choice, the explanation and the oracle agree."""

import asyncio
import itertools

import numpy as np
import pytest
import torch

from tests.e2e.offline import (
    IN_PROCESS,
    PROMPT,
    engine,
    forget,
    generate,
    in_new_process,
    request,
    spy_on_selection,
    worker_model,
)
from tests.photos import photo
from tests.reference import checkpoints, paper

PLANS = [
    {"tokens": 64},
    {"tokens": 128, "alpha": 0.6, "buffer": "square", "object_layer": 2},
    {"ratio": 0.25, "alpha": 1, "buffer": "row"},
    {"tokens": 40, "method": "attention"},
    {"tokens": 40, "method": "random"},
    {"tokens": 40, "method": "stride"},
    {"ratio": 1},
]
PHOTOS = ("chelsea", "coffee")


def explained(llm, prompt, image, plan):
    """The explanation of an image, and the picture that the encoder saw."""
    from hiprune_vllm.engine import explain

    class Client:
        async def collective_rpc(self, method, args):
            return llm.collective_rpc(method, args=args)

    renderer = llm.llm_engine.renderer
    processor = renderer.get_mm_processor()
    inputs = renderer._process_multimodal(
        renderer.tokenizer.encode(prompt),
        {processor.modality: [image]},
        None,
        {"hiprune": plan},
        skip_mm_cache=True,
    )
    told = asyncio.run(processor.explain(Client(), inputs))
    views = explain.views(processor.info, inputs)
    return told, [(number, left, top, pixels) for number, left, top, pixels in views]


def remembered(llm):
    """What the worker has kept of the only image that it has seen."""
    (known,) = worker_model(llm)._kept_before.values() or [None]
    return [part.tolist() for part in known.kept] if known is not None else None


def run(path, prompt, **options):
    llm = engine(
        path, worker_extension_cls="hiprune_vllm.engine.explain.ExplainExtension", **options
    )
    results = []
    for name, plan in itertools.product(PHOTOS, PLANS):
        image = photo(name)
        item = request(image, plan) | {"prompt": prompt}
        forget(llm)
        (answer,) = generate(llm, [item])
        kept = remembered(llm)
        after, views = explained(llm, prompt, image, plan)
        forget(llm)
        before, _ = explained(llm, prompt, image, plan)
        with spy_on_selection() as chosen:
            (again,) = generate(llm, [item])
        results.append(
            {"name": name, "plan": plan, "kept": kept, "after": after, "before": before,
             "views": views, "chosen_again": chosen, "same": answer == again}
        )  # fmt: skip
    return results


def check_agreement(case):
    """The engine's own kept set, and the explanation before and after it."""
    assert case["before"] == case["after"]
    assert case["same"]
    parts = case["before"]
    if case["plan"] != {"ratio": 1}:
        assert [part["kept"] for part in parts] == case["kept"]
        assert case["chosen_again"] == []  # a request after the explanation keeps what it said
    for part in parts:
        count = part["grid"][0] * part["grid"][1]
        assert len(part["scores"]["object"]) == len(part["scores"]["output"]) == count
        assert len(part["roles"]) == len(part["kept"])


def oracle_roles(part, plan, allowed=None):
    """Roles by the slow transcription, from the scores that were told."""
    method = plan.get("method", "hiprune")
    if plan == {"ratio": 1} or method in ("random", "stride"):
        return ["other"] * len(part["kept"])
    alpha, buffer = plan.get("alpha", 0.1), plan.get("buffer", "cross")
    count, columns = len(part["scores"]["object"]), part["grid"][1]
    candidates = list(range(count)) if allowed is None else allowed
    anchors = []
    if method == "hiprune":
        wanted = round(alpha * len(part["kept"]) / (1 + paper.PER_ANCHOR[buffer]))
        anchors = paper.best(candidates, part["scores"]["object"], wanted)
    buffers = {j for i in anchors for j in paper.neighbours(i, columns, count, buffer)}
    return [
        "anchor" if i in anchors else "buffer" if i in buffers else "register" for i in part["kept"]
    ]


def shown_pixels(processed, processor):
    """(3, H, W) normalised pixels as uint8 (H, W, 3), in numpy."""
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    picture = processed.numpy().transpose(1, 2, 0) * std + mean
    return np.round(picture.clip(0, 1) * 255).astype(int)


def close(pixels, expected):
    return pixels.shape == expected.shape and np.abs(pixels.astype(int) - expected).max() <= 1


def run_llava(path):
    return run(path, PROMPT)


def run_next(path):
    return run(path, PROMPT, max_model_len=4096)


def test_llava(clip_checkpoint):
    from tests.reference.llava import LlavaOracle

    oracle = LlavaOracle(clip_checkpoint)
    results = in_new_process(run_llava, str(clip_checkpoint), environment=IN_PROCESS)
    assert len(results) == len(PLANS) * len(PHOTOS)
    for case in results:
        check_agreement(case)
        (part,) = case["before"]
        plan, image = case["plan"], photo(case["name"])
        assert part["roles"] == oracle_roles(part, plan)
        for kind, layer in (("object", plan.get("object_layer", 3)), ("output", 8)):
            expected = oracle.scores(image, layer, cls_only=False)
            torch.testing.assert_close(
                torch.tensor(part["scores"][kind]), torch.tensor(expected).float(), rtol=1e-4,
                atol=1e-6,
            )  # fmt: skip
        if "method" not in plan and plan != {"ratio": 1}:
            options = {k: v for k, v in plan.items() if k not in ("tokens", "ratio")}
            tokens = plan.get("tokens") or round(plan["ratio"] * 576)
            assert part["kept"] == oracle.keep(image, tokens=tokens, **options)
        ((number, left, top, pixels),) = case["views"]
        assert (number, left, top) == (0, 0, 0)
        processor = oracle.processor.image_processor
        assert close(pixels, shown_pixels(oracle.pixels(image), processor))


@pytest.mark.long
def test_llava_next(tmp_path):
    from tests.reference.llava_next import LlavaNextOracle

    checkpoints.build_llava_next(tmp_path)
    oracle = LlavaNextOracle(tmp_path)
    results = in_new_process(run_next, str(tmp_path), environment=IN_PROCESS)
    for case in results:
        check_agreement(case)
        image, plan = photo(case["name"]), case["plan"]
        allowed = oracle.allowed(image)
        whole = plan == {"ratio": 1}
        for part in case["before"]:
            inside = None if whole else allowed[part["tile"]]
            assert part["roles"] == oracle_roles(part, plan, inside)
            assert whole or set(part["kept"]) <= set(inside)
        if "method" not in plan and "tokens" in plan:
            expected = oracle.keep(image, **plan)
            found = {part["tile"]: part["kept"] for part in case["before"]}
            assert [found.get(tile, []) for tile in range(len(expected))] == expected
        processed = oracle.inputs(image)["pixel_values"][0]
        rows, columns = oracle.grid(image)
        side = processed.shape[-1]
        assert [view[:3] for view in case["views"]] == [(0, 0, 0)] + [
            (1 + row * columns + col, side * (1 + col), side * row)
            for row in range(rows)
            for col in range(columns)
        ]
        for number, _, _, pixels in case["views"]:
            assert close(pixels, shown_pixels(processed[number], oracle.processor.image_processor))


@pytest.mark.long
def test_qwen(tmp_path):
    from tests.reference.qwen import QwenOracle

    checkpoints.build_qwen2_5_vl(tmp_path)
    oracle = QwenOracle(tmp_path)
    results = in_new_process(run_qwen, str(tmp_path), environment=IN_PROCESS)
    for case in results:
        check_agreement(case)
        (part,) = case["before"]
        image, plan = photo(case["name"]), case["plan"]
        assert part["roles"] == oracle_roles(part, plan)
        if "method" not in plan and plan != {"ratio": 1}:
            assert part["kept"] == oracle.keep(image, **plan)
        ((_, _, _, pixels),) = case["views"]
        rows, columns = part["grid"]
        assert pixels.shape == (rows * 28, columns * 28, 3)
        # The picture itself, scaled: an upright one would look alike neither turned nor in blocks.
        expected = np.asarray(image.convert("RGB").resize((columns * 28, rows * 28)))
        assert np.abs(pixels.astype(int) - expected).mean() < 4


def run_qwen(path):
    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    return run(path, f"<|im_start|>user\n{vision}What is this?<|im_end|>\n<|im_start|>assistant\n")


def test_tensors_come_whole_through_the_call():
    """vLLM's own encoding of an image's inputs, as frames of bytes and back."""
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFieldElem,
        MultiModalKwargsItem,
    )
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    pixels = torch.randn(3, 10, 10)
    item = MultiModalKwargsItem(
        {"pixel_values": MultiModalFieldElem(data=pixels, field=MultiModalBatchedField())}
    )
    frames = [bytes(frame) for frame in MsgpackEncoder().encode(item)]
    decoded = MsgpackDecoder(MultiModalKwargsItem).decode(frames)
    assert torch.equal(decoded["pixel_values"].data, pixels)
