import pytest

from tests.e2e.conformance import Conformance


@pytest.mark.long
class TestQwen35(Conformance):
    family = "qwen3_5"


@pytest.mark.long
class TestQwen35Moe(Conformance):
    family = "qwen3_5_moe"
