from tests.e2e.conformance import Conformance


class TestGemma3(Conformance):
    family = "gemma3"
