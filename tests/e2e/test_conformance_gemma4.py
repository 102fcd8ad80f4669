import pytest

from tests.e2e.conformance import Conformance


@pytest.mark.long
class TestGemma4(Conformance):
    family = "gemma4"


@pytest.mark.long
class TestGemma4Experts(Conformance):
    family = "gemma4_moe"
