import pytest

from tests.e2e.conformance import Conformance


@pytest.mark.long
class TestIdefics3(Conformance):
    family = "idefics3"


@pytest.mark.long
class TestSmolVLM(Conformance):
    family = "smolvlm"
