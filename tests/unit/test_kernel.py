"""The Triton kernels against the plain path, under Triton's interpreter, which needs no GPU."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPARE = """
import json, torch
from hiprune_vllm.pruning import kernel, scores
found = []
for batch, tokens, heads, width, dtype, first in [
    (1, 1, 1, 8, "float32", False),
    (2, 70, 3, 16, "float32", False),
    (1, 129, 2, 80, "float32", False),
    # Not bfloat16: the interpreter multiplies its bits.
    (2, 64, 2, 64, "float16", False),
    (2, 90, 2, 64, "float32", True),
]:
    generator = torch.Generator().manual_seed(tokens)
    made = torch.randn(batch, tokens, 3, heads, width, generator=generator) * 2
    query, key, _ = made.to(getattr(torch, dtype)).unbind(2)  # strided views, as in a tower
    plain = scores.attention_received(query, key, width**-0.5, from_first_only=first)
    fast = kernel.attention_received(query, key, width**-0.5, from_first_only=first)
    found.append(((plain - fast).abs() / (1e-6 + plain.abs())).max().item())
    again = kernel.attention_received(query, key, width**-0.5, from_first_only=first)
    assert torch.equal(fast, again)
print(json.dumps(found))
"""


def test_the_kernels_give_the_plain_scores():
    ran = subprocess.run(
        [sys.executable, "-c", COMPARE],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    differences = json.loads(ran.stdout.splitlines()[-1])
    assert len(differences) == 5
    assert max(differences) < 1e-4, differences
