import pytest

from tests.e2e.conformance import Conformance


@pytest.mark.long
class TestMistral3(Conformance):
    family = "mistral3"


@pytest.mark.long
class TestMinistral3(Conformance):
    family = "ministral3"


@pytest.mark.long
class TestPixtral(Conformance):
    family = "pixtral"
