"""What a request asks to be guaranteed, as opposed to hoped for."""

from __future__ import annotations

from vllm_mlx.chat.output_formats import OutputFormats
from vllm_mlx.core.chat import ChatRequest
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.sampling import SamplingParams


def enforced(request: ChatRequest, formats: OutputFormats) -> SamplingParams:
    """The request's sampling, with what makes its tool choice and the shape of its answer certain.

    Raises:
        InvalidRequest: it cannot be made certain; `param` names the field.
    """
    if request.tool_choice.mode == "required":
        reason = "tool_choice cannot force a call here: 'auto' and 'none' are offered."
        if formats.tools is None:
            reason = "tool_choice cannot force a call: this server reads no calls (--tool-call-parser none)."
        raise InvalidRequest(reason, param="tool_choice")
    if request.output is not None:
        param = request.output.param
        raise InvalidRequest(f"{param} is not supported: no shape of the answer can be guaranteed here.", param=param)
    return request.sampling
