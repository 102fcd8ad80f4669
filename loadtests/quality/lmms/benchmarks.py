"""The paper's benchmarks in lmms-eval's words, and what the paper reports."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One column of the paper's tables.

    Attributes:
        name: as the paper writes it.
        task: lmms-eval's name.
        metrics: whose sum is the score.
        percent: whether lmms-eval gives a share that the paper prints as 0 to 100.
        note: how this differs from what the paper measured.
    """

    name: str
    task: str
    metrics: tuple[str, ...]
    percent: bool = True
    note: str = ""

    def score(self, results: Mapping[str, object]) -> float | None:
        """From lmms-eval's results of the task ("metric,filter" -> value), None if one is missing.

        MMBench comes in percent already, and MME in points.
        """
        total = 0.0
        for metric in self.metrics:
            found = [
                value
                for name, value in results.items()
                if name.split(",")[0] == metric and isinstance(value, int | float)
            ]
            if not found:
                return None
            total += found[0]
        return 100 * total if self.percent else total


_VALIDATION = "validation half; test goes to a contest server"
_JUDGE = "an answer that names no option goes to a judge model where OPENAI_API_KEY is set"
BENCHMARKS = (
    Benchmark("GQA", "gqa", ("exact_match",)),
    Benchmark("MMB", "mmbench_en_dev", ("gpt_eval_score",), percent=False, note=_JUDGE),
    Benchmark("MMB-CN", "mmbench_cn_dev", ("gpt_eval_score",), percent=False, note=_JUDGE),
    Benchmark("MME", "mme", ("mme_perception_score", "mme_cognition_score"), percent=False),
    Benchmark("POPE", "pope", ("pope_f1_score",)),
    Benchmark("SQA", "scienceqa_img", ("exact_match",)),
    Benchmark("VQAv2", "vqav2_val", ("exact_match",), note=_VALIDATION),
    Benchmark("TextVQA", "textvqa_val", ("exact_match",)),
    Benchmark("VizWiz", "vizwiz_vqa_val", ("exact_match",), note=_VALIDATION),
)
LOCAL = Benchmark("demo shapes", "demo_shapes", ("exact_match",))

PAPER: dict[str, tuple[str, dict[str, float]]] = {
    "llava-1.5": (
        "LLaVA-1.5-7B, 9 benchmarks", {"192": 99.3, "128": 97.5, "64": 92.7},
    ),
    "llava-next": (
        "LLaVA-NeXT-7B, 5 benchmarks", {"640": 102.6, "320": 99.5, "160": 92.5},
    ),
    "qwen2.5-vl": (
        "Qwen2.5-VL-3B, 5 benchmarks", {"0.333": 98.6, "0.222": 97.1, "0.111": 92.8},
    ),
}  # fmt: skip
"""Model -> (what was measured, budget -> average of the unpruned scores kept, percent)."""
