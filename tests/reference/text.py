"""The language model's half of the oracles."""

from collections.abc import Sequence
from typing import Any

import torch


class TextOracle:
    """Log-probabilities of an answer, from a Hugging Face model fed with embeddings."""

    model: Any
    processor: Any

    @torch.inference_mode()
    def logprobs(
        self, prompt: str, visual: Sequence[torch.Tensor], answer: Sequence[int]
    ) -> torch.Tensor:
        """Log-probabilities before every token of `answer`, (len(answer), vocabulary).

        Args:
            prompt: with one `<image>` for each of `visual`.
            visual: kept embeddings of every image.
            answer: token ids, fed back as they were generated.
        """
        tokenizer = self.processor.tokenizer
        embed = self.model.get_input_embeddings()

        def text(ids: Sequence[int]) -> torch.Tensor:
            embedded: torch.Tensor = embed(torch.tensor(list(ids), dtype=torch.long))
            return embedded

        pieces = prompt.split("<image>")
        parts = []
        for i, piece in enumerate(pieces):
            parts.append(text(tokenizer.encode(piece, add_special_tokens=False)))
            if i < len(visual):
                parts.append(visual[i])
        parts.append(text(answer))
        embeds = torch.cat(parts)[None]
        hidden = self.model.model.language_model(inputs_embeds=embeds).last_hidden_state[0]
        logits = self.model.lm_head(hidden[-len(answer) - 1 : -1])
        return torch.log_softmax(logits.double(), dim=-1)
