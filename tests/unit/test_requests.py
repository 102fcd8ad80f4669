import pytest
from pydantic import ValidationError
from vllm.exceptions import VLLMValidationError

from hiprune_server.requests import (
    PrunedChatRequest,
    PrunedMessagesRequest,
    PrunedResponsesRequest,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def refusal(model, body):
    with pytest.raises(VLLMValidationError) as refused:
        model.model_validate(body)
    return refused.value


@pytest.mark.parametrize("odd", [True, 0, 1.5, "x", [], [1]])
def test_what_vllm_stumbles_over_is_refused_by_its_name(odd):
    error = refusal(PrunedChatRequest, CHAT | {"structured_outputs": odd})
    assert error.parameter == "structured_outputs"
    assert "structured_outputs must be" in str(error)


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**400])
@pytest.mark.parametrize("model", [PrunedChatRequest, PrunedMessagesRequest])
def test_an_integer_that_no_message_to_the_engine_can_carry_is_refused(model, number):
    assert refusal(model, CHAT | {"max_tokens": 5, "top_k": number}).parameter == "top_k"
    nested = CHAT | {"max_tokens": 5, "tools": [{"a": number}]}
    assert refusal(model, nested).parameter == "tools[0].a"


def test_good_requests_and_their_budgets_stay_as_they_are():
    plan = {"tokens": 64}
    chat = PrunedChatRequest.model_validate(CHAT | {"top_k": 2**31, "hiprune": plan})
    assert chat.top_k == 2**31
    assert chat.hiprune == plan
    asked = PrunedResponsesRequest.model_validate({"model": "m", "input": "Hi", "hiprune": plan})
    assert asked.hiprune == plan


def test_other_mistakes_are_told_as_vllm_tells_them():
    with pytest.raises(ValidationError, match="temperature"):
        PrunedChatRequest.model_validate(CHAT | {"temperature": "warm"})
