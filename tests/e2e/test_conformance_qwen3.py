import pytest

from tests.e2e.conformance import Conformance


class TestQwen3VL(Conformance):
    family = "qwen3_vl"


@pytest.mark.long
class TestQwen3VLMoe(Conformance):
    family = "qwen3_vl_moe"
