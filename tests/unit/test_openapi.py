"""What the OpenAPI document says of our fields."""

import copy

from hiprune_server.routes.openapi import extend
from hiprune_vllm.plan import KNOBS, SIZES, Encoder, Limits


def test_fields_have_the_ranges_of_the_model_and_doing_it_twice_changes_nothing():
    document = {
        "paths": {"/v1/chat/completions": {"post": {"responses": {"200": {"description": "x"}}}}},
        "components": {
            "schemas": {"PrunedChatRequest": {}, "ChatCompletionContentPartImageParam": {}}
        },
    }
    encoder = Encoder("llava", 23, 9, has_cls=False)
    extend(document, encoder, Limits(max_tokens=99, fixed=("alpha",)))
    schemas = document["components"]["schemas"]
    plan = schemas["HiPrunePlan"]["properties"]
    assert plan["object_layer"]["maximum"] == 22
    assert plan["tokens"]["maximum"] == 99
    assert set(plan) == set(KNOBS) - {"alpha", *SIZES, "max_tiles"}
    assert set(schemas["HiPruneImagePlan"]["properties"]) == set(plan) - {"total_tokens"}
    for name, kind in (
        ("PrunedChatRequest", "HiPrunePlan"),
        ("ChatCompletionContentPartImageParam", "HiPruneImagePlan"),
    ):
        found = schemas[name]["properties"]["hiprune"]
        assert found == {"$ref": f"#/components/schemas/{kind}"}
    once = copy.deepcopy(document)
    extend(document, encoder, Limits(max_tokens=99, fixed=("alpha",)))
    assert document == once
    assert list(document["paths"]) == ["/v1/chat/completions"]
