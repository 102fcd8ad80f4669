import pytest

from tests.e2e.conformance import Conformance


@pytest.mark.long
class TestKimiVL(Conformance):
    family = "kimi_vl"
