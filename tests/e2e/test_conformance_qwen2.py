from tests.e2e.conformance import Conformance


class TestQwen2VL(Conformance):
    family = "qwen2_vl"


class TestQwen25VL(Conformance):
    family = "qwen2_5_vl"
