"""Two real servers behind vLLM's router and the gate: a picture's questions find it cached."""

from contextlib import ExitStack

import pytest
from openai import OpenAI

from tests import routing
from tests.e2e.serving import BIN, content, running
from tests.photos import photo

pytestmark = pytest.mark.skipif(bool(routing.MISSING), reason=routing.MISSING)

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
QUESTIONS = ("What is this?", "Where is it?", "How many are there?")


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    command = [str(BIN / "hiprune-serve"), "--demo", "--enable-prompt-tokens-details"]
    key = {"VLLM_API_KEY": routing.KEY}
    with ExitStack() as stack:
        yield [
            stack.enter_context(running(command, folder, model="hiprune-demo", environment=key))
            for _ in range(2)
        ]


@pytest.fixture(scope="module")
def client(replicas, tmp_path_factory):
    """OpenAI's, which knows nothing of replicas."""
    folder = tmp_path_factory.mktemp("gate")
    with (
        routing.router([replica.url for replica in replicas], folder) as router,
        routing.gate(str(router.base_url), folder) as gate,
    ):
        yield OpenAI(base_url=f"{gate.base_url}/v1", api_key=routing.KEY, max_retries=0, timeout=60)


@pytest.mark.long
def test_follow_up_questions_find_the_picture_in_the_prefix_cache(client, replicas):
    shown = [photo(name).resize((336, 336)).rotate(turn) for name in PHOTOS for turn in (0, 90)]
    for picture in shown:
        for turn, question in enumerate(QUESTIONS):
            words, image = content([picture], question)
            answer = client.chat.completions.create(
                model="hiprune-demo",
                messages=[{"role": "user", "content": [image, words]}],
                max_tokens=1,
                extra_body={"hiprune": {"tokens": 400}},
            )
            assert answer.hiprune["images"][0]["tokens_kept"] == 400
            details = answer.usage.prompt_tokens_details
            cached = details.cached_tokens if details else 0
            assert (cached >= 256) == (turn > 0), (question, answer.usage)
    served = [replica.total("hiprune_images_total") for replica in replicas]
    assert sum(served) == len(shown) * len(QUESTIONS)
    assert min(served) >= len(QUESTIONS)  # both have some
