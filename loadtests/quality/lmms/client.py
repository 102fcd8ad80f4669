"""lmms-eval's OpenAI client with a budget in every request."""

import json
import os
import threading
from pathlib import Path
from typing import Any

from lmms_eval.models.chat.openai import OpenAICompatible

PREFIX = "hiprune_"


class HiPrune(OpenAICompatible):  # type: ignore[misc]
    """`--model_args hiprune_tokens=64,...`: each such argument is a field of the budget.

    Args:
        kept_log: file that gets a JSON line for every answer: visual tokens full and kept, as the
            server reported them.
        model_args: `hiprune_*` and those of lmms-eval's own client.
    """

    def __init__(self, *, kept_log: str, **model_args: Any) -> None:
        plan = {
            name.removeprefix(PREFIX): model_args.pop(name)
            for name in list(model_args)
            if name.startswith(PREFIX)
        }
        # Not OPENAI_API_KEY, which some benchmarks send to a judge elsewhere, and not an argument,
        # which lmms-eval writes into its logs.
        super().__init__(api_key=os.environ.get("EVAL_API_KEY", "none"), **model_args)
        self._kept_log = Path(kept_log)
        self._writing = threading.Lock()
        create = self.client.chat.completions.create

        def create_with_budget(**payload: Any) -> Any:
            extra = dict(payload.pop("extra_body", None) or {})
            if plan:
                extra["hiprune"] = plan
            response = create(**payload, extra_body=extra)
            self._note((response.model_extra or {}).get("hiprune") or {})
            return response

        self.client.chat.completions.create = create_with_budget

    def _note(self, report: dict[str, Any]) -> None:
        images = report.get("images", [])
        line = {
            "full": sum(one["tokens_full"] for one in images),
            "kept": sum(one["tokens_kept"] for one in images),
        }
        with self._writing, self._kept_log.open("a") as file:
            file.write(json.dumps(line) + "\n")
