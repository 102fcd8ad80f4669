import pytest

from tests.e2e.conformance import Conformance


@pytest.mark.long
class TestLlava(Conformance):
    family = "llava"


@pytest.mark.long
class TestLlavaNext(Conformance):
    family = "llava_next"


@pytest.mark.long
class TestGraniteVision(Conformance):
    family = "granite_vision"


@pytest.mark.long
class TestLlavaOnevision(Conformance):
    family = "llava_onevision"
