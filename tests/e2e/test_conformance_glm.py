import pytest

from tests.e2e.conformance import Conformance


@pytest.mark.long
class TestGlm4v(Conformance):
    family = "glm4v"


@pytest.mark.long
class TestGlm46v(Conformance):
    family = "glm46v"


@pytest.mark.long
class TestGlm4vMoe(Conformance):
    family = "glm4v_moe"
