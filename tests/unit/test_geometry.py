"""Checkpoints without weights: what vLLM and a client read from them."""

import pytest
import transformers
from PIL import Image

from loadtests import geometry


@pytest.mark.parametrize("name", geometry.NAMES)
def test_every_checkpoint_has_its_configuration_and_a_processor_that_counts_tokens(name, tmp_path):
    folder = geometry.write(name, tmp_path / "new" / name)
    config = transformers.AutoConfig.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=[Image.new("RGB", (672, 672))], text=[prompt])
    token = getattr(config, "image_token_id", None) or config.image_token_index
    # One tile; a base tile and 2 x 2 with a newline a row; 2 x 2 tiles and a thumbnail of 16 x 16;
    # 48 x 48 patches merged by 4.
    expected = {
        "llava": 576,
        "llava-next": 576 + 48 * 49,
        "internvl": 5 * 256,
        "qwen": 24 * 24,
    }
    assert sum(i == token for i in inputs["input_ids"][0]) == expected[name.rpartition("-")[0]]
    assert config.architectures[0].endswith("ForConditionalGeneration")
    assert config.text_config.vocab_size == len(processor.tokenizer) == geometry.VOCABULARY


def test_every_token_that_dummy_weights_may_answer_with_is_text(tmp_path):
    folder = geometry.write("llava-tiny", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode([geometry.VOCABULARY - 1]) == f"~{geometry.VOCABULARY - 1}"
    assert tokenizer.decode(tokenizer("naïve", add_special_tokens=False)["input_ids"]) == "naïve"
