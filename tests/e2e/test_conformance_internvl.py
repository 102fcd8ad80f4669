import pytest

from tests.e2e.conformance import Conformance


@pytest.mark.long
class TestInternVLChat(Conformance):
    family = "internvl"


@pytest.mark.long
class TestInternVL(Conformance):
    family = "internvl_hf"
