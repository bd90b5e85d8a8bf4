"""What clients may send: the request bodies of the API, every field typed strictly and bounded.

A field that would change the output and is not built yet is refused by name; other unknown fields
are ignored, since clients of OpenAI's API send new ones. null means "not given" everywhere. The
bounds come before any fan-out: nothing here allocates more than the body itself.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from jslora.aliases import MAX_TARGETS
from jslora.config import NAME
from jslora.errors import InvalidRequest
from jslora.request import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_SCALE,
    MAX_SLO_SECONDS,
    MAX_STOP_IDS,
    SamplingParams,
)

MAX_CHOICES = 256
MAX_ADAPTERS = 16
MAX_N = 64
MAX_STOP = 16
MAX_STOP_CHARS = 256
MAX_MESSAGES = 4096
MAX_SALT_CHARS = 128
MAX_DRAIN_SECONDS = 3600
MAX_WEIGHT = 1e9
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**53

# Field → the values that ask for nothing.
NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "return_tokens_as_token_ids": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "modalities": (["text"],),
    "audio": (),
    "logits_processors": ([],),
}

Token = Annotated[int, Field(ge=0, lt=2**31)]


class Body(BaseModel):
    """A JSON object; null fields count as absent and unknown ones are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class ScaledAdapter(Body):
    """An adapter, or an alias, and what its delta is multiplied by."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    scale: Annotated[float, Field(ge=0, le=MAX_SCALE)] = 1.0


class GenerationBody(Body):
    """The fields that completions and chat share.

    `adapters`: their deltas, times their scales, are added to the base's outputs; `model` names the
    base then.
    `priority` is vLLM's: lower goes earlier. `ttft_slo`: seconds in which the first token must come
    or the request is given up. A server whose policy looks at neither refuses them.
    """

    model: Annotated[str, Field(min_length=1, max_length=256)]
    adapters: Annotated[list[ScaledAdapter], Field(max_length=MAX_ADAPTERS)] = []
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 0
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = None
    stop: str | list[str] = []
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_STOP_IDS)] = []
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    user: Annotated[str, Field(max_length=1024)] = ""
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_CHARS)] = ""
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)] = 0
    ttft_slo: Annotated[float, Field(gt=0, le=MAX_SLO_SECONDS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_built(cls, data: dict[str, Any]) -> dict[str, Any]:
        for name, harmless in NOT_BUILT.items():
            value = data.get(name)
            if value is not None and not any(_same(value, allowed) for allowed in harmless):
                raise InvalidRequest(f"{name} is not built yet", param=name)
        return data

    @field_validator("stop")
    @classmethod
    def _bound_stop(cls, stop: str | list[str]) -> list[str]:
        strings = [stop] if isinstance(stop, str) else stop
        if len(strings) > MAX_STOP:
            raise ValueError(f"at most {MAX_STOP} stop strings are allowed")
        if not all(0 < len(string) <= MAX_STOP_CHARS for string in strings):
            raise ValueError(f"a stop string has 1 to {MAX_STOP_CHARS} characters")
        return strings

    @field_validator("logit_bias")
    @classmethod
    def _bound_bias(cls, bias: dict[str, float]) -> dict[str, float]:
        if len(bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"at most {MAX_LOGIT_BIAS} entries are allowed")
        if not all(key.isascii() and key.isdecimal() and len(key) <= 10 for key in bias):
            raise ValueError("keys must be token ids, as decimal strings")
        return bias

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationBody":
        if self.stream_options and not self.stream:
            raise InvalidRequest("stream_options needs stream: true", param="stream_options")
        return self

    def sampling(self, max_tokens: int, **logprobs: int | None) -> SamplingParams:
        """The engine's parameters.

        Raises:
            InvalidRequest: `min_tokens` is above `max_tokens`.
        """
        if self.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens {self.min_tokens} is above max_tokens {max_tokens}", param="min_tokens"
            )
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((int(key), value) for key, value in self.logit_bias.items()),
            stop=tuple(self.stop),
            include_stop_str=self.include_stop_str_in_output,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            skip_special_tokens=self.skip_special_tokens,
            **logprobs,
        )


class CompletionBody(GenerationBody):
    """`POST /v1/completions`; a prompt is text or token ids, one or a list of them."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _name_the_kinds(cls, prompt: Any) -> Any:
        """Say in one sentence what four alternatives would say in four."""
        if isinstance(prompt, str) or _all(prompt, str) or _all(prompt, int):
            return prompt
        if isinstance(prompt, list) and prompt and all(_all(ids, int) for ids in prompt):
            return prompt
        raise ValueError("must be text, token ids, or a non-empty list of texts or of token ids")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, always as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """One turn; its text is `content`, or its parts joined by newlines."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    name: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_tool_calls(cls, data: Any) -> Any:
        for field in ("tool_calls", "function_call"):
            if isinstance(data, dict) and data.get(field):
                raise InvalidRequest(f"{field} in messages is not built yet", param="messages")
        return data

    def plain(self) -> dict[str, str]:
        """The message as chat templates expect it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        plain = {"role": self.role, "content": text}
        return plain | {"name": self.name} if self.name else plain


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    echo: Literal[False] = False

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return self


class LoadBody(Body):
    """`POST /v1/load_lora_adapter`; without a path, the folder of that name below a root."""

    lora_name: Annotated[str, Field(pattern=rf"^{NAME}$")]
    lora_path: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    load_inplace: bool = False


class UnloadBody(Body):
    """`POST /v1/unload_lora_adapter`; `drain_seconds` in place of the configuration's."""

    lora_name: Annotated[str, Field(pattern=rf"^{NAME}$")]
    drain_seconds: Annotated[float, Field(ge=0, le=MAX_DRAIN_SECONDS)] | None = None


class AliasBody(Body):
    """`PUT /v1/aliases/{name}`: names of adapters, or the base's, with their weights."""

    targets: Annotated[
        dict[
            Annotated[str, Field(pattern=rf"^{NAME}$")],
            Annotated[float, Field(gt=0, le=MAX_WEIGHT)],
        ],
        Field(min_length=1, max_length=MAX_TARGETS),
    ]


class TokenizeBody(Body):
    """`POST /tokenize`: a prompt, or messages that the chat template turns into one."""

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> "TokenizeBody":
        if (self.prompt is None) == (not self.messages):
            raise InvalidRequest("give either prompt or messages", param="prompt")
        return self


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: Annotated[str, Field(max_length=256)] | None = None
    tokens: Annotated[list[Token], Field(max_length=2**20)]


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(type(v) is kind for v in values)


def _same(value: Any, allowed: Any) -> bool:
    """Equality that tells true from 1."""
    return type(value) is type(allowed) and value == allowed
