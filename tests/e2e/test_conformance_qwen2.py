import pytest

from tests.e2e.conformance import Conformance


@pytest.mark.long
class TestQwen2VL(Conformance):
    family = "qwen2_vl"


@pytest.mark.long
class TestQwen25VL(Conformance):
    family = "qwen2_5_vl"
