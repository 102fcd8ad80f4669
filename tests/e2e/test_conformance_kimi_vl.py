import pytest

from tests.e2e.conformance import Conformance


@pytest.mark.long
class TestKimiVL(Conformance):
    family = "kimi_vl"


@pytest.mark.long
class TestKimiK25(Conformance):
    family = "kimi_k25"
