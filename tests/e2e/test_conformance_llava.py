from tests.e2e.conformance import Conformance


class TestLlava(Conformance):
    family = "llava"


class TestLlavaNext(Conformance):
    family = "llava_next"
