"""Pixtral's tower in Hugging Face's two models of it: a small checkpoint and an oracle for each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.reference import checkpoints, paper, random_llava
from tests.reference.one_grid import OneGrid

SPECIAL_TOKENS: Final = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
)
IMAGE, BREAK, END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}[IMG]{% endif %}"
    "{% endfor %}{% endif %}[/INST]{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


class Kind(NamedTuple):
    """What is a model's own.

    Attributes:
        patch: pixels a side.
        merge: patches a side of a token.
        image_size: that the tower is made for.
        longest: pixels that a picture is scaled to at most.
        text: classes of its language model's configuration, and what is that one's own.
    """

    patch: int
    merge: int
    image_size: int
    longest: int
    text: str
    own: dict[str, Any]


_MINISTRAL = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
}

KINDS: Final = {
    "mistral3": Kind(14, 2, 1540, 560, "Mistral", {"sliding_window": None}),
    "ministral3": Kind(14, 2, 1540, 560, "Ministral3", _MINISTRAL),
    "pixtral": Kind(16, 1, 320, 320, "Mistral", {"sliding_window": None}),
}


def build(kind: str, folder: Path, *, seed: int = 3) -> None:
    """A model whose tower has 8 narrow blocks."""
    import transformers

    own = KINDS[kind]
    tokenizer = random_llava.byte_tokenizer(
        SPECIAL_TOKENS, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    text = {**checkpoints.small_text(tokenizer), "head_dim": 32, "rms_norm_eps": 1e-5, **own.own}
    vision = {
        **checkpoints.SMALL_TOWER,
        "image_size": own.image_size,
        "patch_size": own.patch,
        "head_dim": 16,
    }
    name, of_model = "Mistral3", {"spatial_merge_size": own.merge}
    if own.merge == 1:
        name, of_model = "Llava", {"vision_feature_select_strategy": "full"}
    config = getattr(transformers, f"{name}Config")(
        vision_config=transformers.PixtralVisionConfig(**vision),
        text_config=getattr(transformers, f"{own.text}Config")(**text),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        **of_model,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        random_llava.spread_weights(model, tokenizer)
    model.save_pretrained(folder)
    processor = transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(
            size={"longest_edge": own.longest},
            patch_size={"height": own.patch, "width": own.patch},
        ),
        tokenizer=tokenizer,
        patch_size=own.patch,
        spatial_merge_size=own.merge,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)


class Encoding(NamedTuple):
    """What the tower makes of an image.

    Attributes:
        attentions: (heads, patches, patches) of every block.
        tokens: (tokens, width), what the language model gets of the whole image.
        rows, columns: of its tokens.
    """

    attentions: list[torch.Tensor]
    tokens: torch.Tensor
    rows: int
    columns: int


class PixtralOracle(OneGrid):
    """A checkpoint in fp32; its tokens are chosen by the slow transcription of the paper.

    Subclasses have another tower.

    Attributes:
        picture: what stands for an image in a prompt.
    """

    picture = IMAGE

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        self.tokenizer = self.processor.tokenizer
        config = self.model.config
        self.merge = getattr(config, "spatial_merge_size", 1)
        self.depth = config.vision_config.num_hidden_layers
        self.object_layer = self.depth // 2 if self.merge > 1 else round(9 / 24 * self.depth)
        self._seen: dict[Any, Encoding] = {}

    @torch.inference_mode()
    def _encode(self, image: Image.Image) -> Encoding:
        key = (image.size, image.tobytes())
        if key in self._seen:
            return self._seen[key]
        attentions: list[torch.Tensor] = []
        hooks = [
            layer.attention.register_forward_hook(
                lambda module, args, made: attentions.append(made[1][0])
            )
            for layer in self.model.model.vision_tower.transformer.layers
        ]
        (text,) = self.processor(text=IMAGE, images=[image.convert("RGB")])["input_ids"]
        inputs = self.processor(text=IMAGE, images=[image.convert("RGB")], return_tensors="pt")
        (tokens,) = self.model.model.get_image_features(
            pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"]
        ).pooler_output
        for hook in hooks:
            hook.remove()
        ends = [self.processor.tokenizer.convert_tokens_to_ids(token) for token in (BREAK, END)]
        rows = sum(token in ends for token in text)
        columns = len(tokens) // rows
        self._seen[key] = Encoding(attentions, tokens, rows, columns)
        return self._seen[key]

    def scores(self, image: Image.Image, layer: int) -> list[float]:
        """Mean over the patches of a token, one token after another."""
        encoded, merge = self._encode(image), self.merge
        patches = paper.scores(encoded.attentions[layer - 1], has_cls=False)
        across = encoded.columns * merge
        return [
            sum(
                patches[(row * merge + down) * across + column * merge + right]
                for down in range(merge)
                for right in range(merge)
            )
            / merge**2
            for row in range(encoded.rows)
            for column in range(encoded.columns)
        ]

    def count(self, image: Image.Image) -> int:
        return len(self._encode(image).tokens)

    def columns(self, image: Image.Image) -> int:
        return self._encode(image).columns

    def _embedded(self, *tokens: str) -> torch.Tensor:
        ids = self.processor.tokenizer.convert_tokens_to_ids(list(tokens))
        embedded: torch.Tensor = self.model.get_input_embeddings()(torch.tensor(ids))
        return embedded

    def visual(self, image: Image.Image, indices: Sequence[int]) -> torch.Tensor:
        """What stands for an image: a whole one has ends of rows, a pruned one its own alone."""
        _, tokens, _, columns = self._encode(image)
        if len(indices) < len(tokens):
            return torch.cat([tokens[list(indices)], self._embedded(END)])
        lines = []
        for line in tokens.split(columns):
            lines += [line, self._embedded(BREAK)]
        return torch.cat([*lines[:-1], self._embedded(END)])

    @torch.inference_mode()
    def logprobs(
        self,
        text: str,
        images: Sequence[Image.Image],
        kept: Sequence[Sequence[int]],
        answer: Sequence[int],
    ) -> torch.Tensor:
        """Log-probabilities before every token of `answer`, (len(answer), vocabulary)."""
        embed = self.model.get_input_embeddings()
        visual = [self.visual(*of_image) for of_image in zip(images, kept, strict=True)]
        embeds = []
        for i, piece in enumerate(text.split(self.picture)):
            ids = self.tokenizer.encode(piece, add_special_tokens=False)
            embeds.append(embed(torch.tensor(ids, dtype=torch.long)))
            embeds += visual[i : i + 1]
        embeds.append(embed(torch.tensor(list(answer))))
        states = self.model.model.language_model(
            inputs_embeds=torch.cat(embeds)[None]
        ).last_hidden_state[0]
        logits = self.model.lm_head(states[-len(answer) - 1 : -1])
        return torch.log_softmax(logits.double(), dim=-1)
