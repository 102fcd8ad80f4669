"""The tokenizer: one token a word or mark, questions in lower case, and the chat template."""

from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hiprune_server.demo.language import STRANGE_NOUNS, split, vocabulary

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<answer>")
PAD, START, END, UNKNOWN_WORD, IMAGE, ANSWER = range(len(SPECIAL))
WORDS = (*SPECIAL, *vocabulary())
IDS = {word: i for i, word in enumerate(WORDS)}

# All pictures of the conversation, then the last question: the model has seen one question at a
# time, and so a follow-up is answered as well as a first one.
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% set said = namespace(last='') %}"
    "{% for message in messages if message['role'] == 'user' %}"
    "{% if message['content'] is string %}{% set said.last = message['content'] %}"
    "{% else %}{% set said.last = '' %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{% set said.last = said.last + ' ' + part['text'] %}"
    "{% else %}<image>{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{{ said.last }}<answer>"
)
_FORGOTTEN = 0.15  # share of questions without the mark at their end
_POLITE = 0.1  # share of questions with "please" in them
_NEW_WORD = 0.5  # share of strange nouns that the model has no word for


def tokenizer() -> Any:
    """What vLLM loads: gives the ids that the model was trained on."""
    words = Tokenizer(models.WordLevel(vocab=IDS, unk_token="<unk>"))
    words.add_special_tokens(list(SPECIAL))
    words.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # no space before a mark
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=4096,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def asked(text: str, rng: np.random.Generator) -> list[int]:
    """Ids of a question as people type it."""
    words = split(text.lower())
    if len(words) > 1 and words[-1] in "?.!" and rng.random() < _FORGOTTEN:
        words.pop()
    if rng.random() < _POLITE:
        words.insert(len(words) - 1 if rng.random() < 0.5 else 0, "please")
    new = {word for word in words if word in STRANGE_NOUNS and rng.random() < _NEW_WORD}
    return [UNKNOWN_WORD if word in new else IDS[word] for word in words] + [ANSWER]


def answered(text: str) -> list[int]:
    """Ids of an answer with its end."""
    return [IDS[word] for word in split(text)] + [END]
