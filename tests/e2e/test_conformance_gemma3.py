import pytest

from tests.e2e.conformance import Conformance


@pytest.mark.long
class TestGemma3(Conformance):
    family = "gemma3"
