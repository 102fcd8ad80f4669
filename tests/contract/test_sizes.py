"""`min_pixels` and `max_pixels` of single pictures, against Hugging Face's own image processor."""

from itertools import product

import pytest
import torch
import transformers
from PIL import Image
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils import processor as of_vllm

from tests.photos import photo
from tests.reference import checkpoints, random_llava

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
PICTURES = {
    "photo": photo("chelsea"),
    "tall": photo("coffee").resize((70, 400)),
    "tiny": Image.new("RGB", (9, 5), "red"),
    "dot": Image.new("RGB", (1, 1)),
}
SIZES = [
    {},
    {"max_pixels": 30_000},
    {"max_pixels": 1},
    {"min_pixels": 60_000},
    {"min_pixels": 20_000, "max_pixels": 20_000},
]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    checkpoints.build_qwen(request.param, folder)
    return folder


def a_processor(folder, **options):
    args = EngineArgs(model=str(folder), dtype="float32", max_model_len=4096, **options)
    return MULTIMODAL_REGISTRY.create_processor(args.create_model_config())


@pytest.fixture(scope="module")
def processor(folder):
    return a_processor(folder)


def asked(processor, pictures, plans, **others):
    items = processor.info.parse_mm_data({"image": pictures, **others})
    video = "<|vision_start|><|video_pad|><|vision_end|>" if others else ""
    result = processor(
        IMAGE * len(pictures) + video + "What?", items, hf_processor_mm_kwargs={"hiprune": plans}
    )
    return result, [item.get_data() for item in result["mm_kwargs"]["image"]]


def by_hugging_face(folder, picture, sizes):
    """Pixels and grid; where one wish leaves the other behind, it is both."""
    image_processor = transformers.AutoImageProcessor.from_pretrained(folder)
    least, most = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    most = sizes.get("max_pixels", most)
    least = min(sizes.get("min_pixels", least), most)
    size = {"shortest_edge": least, "longest_edge": most}
    made = image_processor(
        picture, size=size, return_tensors="pt", do_rescale=False, do_normalize=False
    )  # vLLM's model does these itself
    return made["pixel_values"].to(torch.uint8), made["image_grid_thw"][0]


@pytest.mark.parametrize("name", PICTURES)
def test_each_picture_is_scaled_as_the_checkpoints_processor_does(folder, processor, name):
    for sizes in SIZES:
        result, (item,) = asked(processor, [PICTURES[name]], sizes)
        pixels, grid = by_hugging_face(folder, PICTURES[name], sizes)
        assert item["image_grid_thw"].tolist() == grid.tolist()
        torch.testing.assert_close(item["pixel_values"], pixels, rtol=0, atol=0)
        tokens = int(grid.prod()) // 4
        assert result["hiprune"][0]["tokens_full"] == tokens
        assert result["mm_placeholders"]["image"][0].length == tokens


def test_pictures_of_one_request_have_sizes_of_their_own(folder, processor):
    pairs = list(product(PICTURES.values(), SIZES[:4]))
    pictures, plans = [picture for picture, _ in pairs], [plan for _, plan in pairs]
    plans = [plan | {"ratio": 0.5} if i % 2 else plan for i, plan in enumerate(plans)]
    result, items = asked(processor, pictures, plans)
    for (picture, sizes), plan, item, place, told in zip(
        pairs, plans, items, result["mm_placeholders"]["image"], result["hiprune"], strict=True
    ):
        pixels, grid = by_hugging_face(folder, picture, sizes)
        torch.testing.assert_close(item["pixel_values"], pixels, rtol=0, atol=0)
        full = int(grid.prod()) // 4
        kept = max(1, round(full * plan.get("ratio", 1)))
        assert (told["tokens_full"], told["tokens_kept"], place.length) == (full, kept, kept)


def test_a_video_beside_scaled_pictures_stays_as_it_is(processor):
    clip = torch.zeros(4, 112, 112, 3).numpy(), {"fps": 2.0, "total_num_frames": 4,
                                                  "frames_indices": [0, 1, 2, 3]}  # fmt: skip
    pictures = [PICTURES["photo"], PICTURES["tall"]]
    found = [
        asked(processor, pictures, plans, video=[clip])[0]["mm_kwargs"]["video"][0].get_data()
        for plans in ({}, [{"max_pixels": 9_000}, {}])
    ]
    assert found[0].keys() == found[1].keys()
    assert torch.equal(found[0]["pixel_values_videos"], found[1]["pixel_values_videos"])
    assert torch.equal(found[0]["video_grid_thw"], found[1]["video_grid_thw"])


def test_another_size_is_another_picture_for_every_cache(processor):
    plans = [{}, {"max_pixels": 30_000}, {"max_pixels": 30_001}, {"min_pixels": 60_000}]
    result, _ = asked(processor, [PICTURES["photo"]] * 4, plans)
    assert len(set(result["mm_hashes"]["image"])) == 4


def test_no_size_makes_a_processor_of_its_own(processor):
    asked(processor, [PICTURES["photo"]], {"max_pixels": 30_000})
    before = of_vllm.cached_get_processor.cache_info().misses
    for more in range(20):
        asked(processor, [PICTURES["photo"]], {"max_pixels": 31_000 + more})
    assert of_vllm.cached_get_processor.cache_info().misses == before


@pytest.mark.parametrize(
    ("plan", "field", "told"),
    [
        ({"max_pixels": 10**8}, "max_pixels", r"must be at most \d+ \(limits.max_pixels\), got"),
        ({"min_pixels": 10**8}, "min_pixels", r"must be at most \d+ \(limits.max_pixels\), got"),
        ({"min_pixels": 9, "max_pixels": 8}, "min_pixels", "must be at most max_pixels 8, got 9"),
        ({"max_pixels": 0}, "max_pixels", "must be an integer in"),
        ({"max_pixels": "1"}, "max_pixels", "must be an integer in"),
    ],
)
def test_sizes_beyond_what_memory_was_measured_with_are_refused(processor, plan, field, told):
    with pytest.raises(VLLMValidationError, match=told) as error:
        asked(processor, [PICTURES["photo"]], plan)
    assert error.value.parameter == f"hiprune.{field}"


def test_no_shape_is_rounded_up_beyond_the_largest_picture(processor):
    largest, most = processor.info.get_max_image_tokens(), processor.pruning.pixels[1]
    refusals = []
    for width, height in product((1, 7, 31, 100, 333), repeat=2):
        if max(width, height) > 200 * min(width, height):
            continue
        try:
            result, _ = asked(processor, [Image.new("RGB", (width, height))], {"min_pixels": most})
            assert result["hiprune"][0]["tokens_full"] <= largest
        except VLLMValidationError as error:
            refusals.append((error.parameter, f"of {largest} that one may have" in str(error)))
    assert refusals
    assert set(refusals) == {("hiprune.min_pixels", True)}


def test_the_operator_limits_pictures_of_which_nobody_says_anything(folder):
    options = {"hiprune": {"ratio": 1.0}, "hiprune_limits": {"max_pixels": 20_000}}
    limited = a_processor(folder, mm_processor_kwargs=options)
    for plan in ({}, {"max_pixels": 20_000}):
        _, (item,) = asked(limited, [PICTURES["photo"]], plan)
        pixels, _ = by_hugging_face(folder, PICTURES["photo"], {"max_pixels": 20_000})
        torch.testing.assert_close(item["pixel_values"], pixels, rtol=0, atol=0)
    with pytest.raises(VLLMValidationError, match="at most 20000"):
        asked(limited, [PICTURES["photo"]], {"max_pixels": 20_001})
    default = {"hiprune": {"max_pixels": 20_000}}  # a request may ask for more than a default
    _, (item,) = asked(
        a_processor(folder, mm_processor_kwargs=default),
        [PICTURES["photo"]],
        {"max_pixels": 40_000},
    )
    pixels, _ = by_hugging_face(folder, PICTURES["photo"], {"max_pixels": 40_000})
    torch.testing.assert_close(item["pixel_values"], pixels, rtol=0, atol=0)


def test_a_requests_sizes_go_before_the_engines_options(folder):
    engine_wide = a_processor(folder, mm_processor_kwargs={"max_pixels": 60_000})
    assert engine_wide.pruning.limits.max_pixels == engine_wide.pruning.pixels[1] == 60_000
    for plan, sizes in (
        ({}, {"max_pixels": 60_000}),
        ({"max_pixels": 15_000}, {"max_pixels": 15_000}),
        ({"min_pixels": 30_000}, {"min_pixels": 30_000, "max_pixels": 60_000}),
    ):
        for name in ("photo", "tiny"):
            result, (item,) = asked(engine_wide, [PICTURES[name]], plan)
            pixels, grid = by_hugging_face(folder, PICTURES[name], sizes)
            torch.testing.assert_close(item["pixel_values"], pixels, rtol=0, atol=0)
            assert result["hiprune"][0]["tokens_full"] == int(grid.prod()) // 4
    with pytest.raises(VLLMValidationError, match="at most 60000"):
        asked(engine_wide, [PICTURES["photo"]], {"max_pixels": 60_001})


def test_families_of_fixed_sizes_refuse_both_knobs(tmp_path):
    random_llava.build(tmp_path)
    processor = a_processor(tmp_path)
    items = processor.info.parse_mm_data({"image": [PICTURES["photo"]]})
    with pytest.raises(VLLMValidationError, match="must be left out for this model"):
        processor("<image>", items, hf_processor_mm_kwargs={"hiprune": {"max_pixels": 9000}})
    with pytest.raises(RuntimeError, match=r"limits\.max_pixels must be unset for this model"):
        a_processor(tmp_path, mm_processor_kwargs={"hiprune_limits": {"max_pixels": 9000}})


def cut_into(processor, size, plan):
    """Tiles of a picture, the base first, and its tokens before pruning."""
    items = processor.info.parse_mm_data({"image": [PICTURES["photo"].resize(size)]})
    result = processor("<image>", items, hf_processor_mm_kwargs={"hiprune": plan})
    data = result["mm_kwargs"]["image"][0].get_data()
    return data["pixel_values"], result["hiprune"][0]["tokens_full"]


def test_a_picture_is_cut_into_no_more_tiles_than_it_may_have(tmp_path):
    checkpoints.build_llava_next(tmp_path)
    processor = a_processor(tmp_path)
    least, most = processor.pruning.encoder.tiles
    assert least < most
    wanted = range(least, most + 1)
    cut = 0
    for size in product((20, 90, 336, 500, 1300, 3000), repeat=2):
        whole, full = cut_into(processor, size, {})
        found = [cut_into(processor, size, {"max_tiles": tiles}) for tiles in wanted]
        for tiles, (pixels, count) in zip(wanted, found, strict=True):
            assert len(pixels) - 1 <= tiles
            assert count <= full
            if len(whole) - 1 <= tiles:  # nothing was to be done
                assert torch.equal(pixels, whole)
            else:
                cut += 1
    assert cut > 20
    for plan, told in (
        ({"max_tiles": most + 1}, rf"max_tiles must be an integer in \[{least}, {most}\]"),
        ({"max_pixels": 9000}, "max_pixels must be left out for this model"),
    ):
        items = processor.info.parse_mm_data({"image": [PICTURES["photo"]]})
        with pytest.raises(VLLMValidationError, match=told):
            processor("<image>", items, hf_processor_mm_kwargs={"hiprune": plan})
