"""Every error a user can cause or must see, with the HTTP status and OpenAI error type it maps to.

Invariant: the text of these errors is safe to show to a client: it names the offending value and
what is allowed, and never holds file-system paths outside the adapter roots, addresses or secrets.
"""


class JsloraError(Exception):
    """Base of all errors that reach a user; `status` and `type` follow OpenAI's error object."""

    status = 500
    type = "internal_error"
    retry_after: float | None = None

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if retry_after is not None:
            self.retry_after = retry_after


class InvalidRequest(JsloraError):
    """The request cannot be served as written."""

    status = 400
    type = "invalid_request_error"


class AdapterRejected(JsloraError):
    """An adapter's files cannot be bound exactly to the base model; nothing was allocated."""

    status = 400
    type = "adapter_rejected"


class Unauthorized(JsloraError):
    """No API key, or one that is not configured."""

    status = 401
    type = "authentication_error"


class UnknownModel(JsloraError):
    """No base model or adapter of that name is visible to the caller."""

    status = 404
    type = "not_found_error"


class Overloaded(JsloraError):
    """The bounded queue is full; the same request may succeed later."""

    status = 503
    type = "overloaded_error"
    retry_after = 1.0


class RateLimited(JsloraError):
    """A quota or rate of the tenant or the adapter is used up; `retry_after` says until when."""

    status = 429
    type = "rate_limit_error"
    retry_after = 1.0


class TooLate(JsloraError):
    """It could not have been answered in its time, so it was given up before it cost anything."""

    status = 503
    type = "too_late_error"
    retry_after = 1.0


class Unavailable(JsloraError):
    """The engine is starting, draining or restarting; the same request may succeed later."""

    status = 503
    type = "unavailable_error"
    retry_after = 5.0


class EngineFailed(JsloraError):
    """The step that served this request failed and its state was lost; it may be sent again."""

    status = 503
    type = "engine_error"
    retry_after = 1.0


class CorruptOutput(JsloraError):
    """The logits of this request were not finite; sending it again cannot help."""

    status = 500
    type = "corrupt_output_error"


class ConfigError(JsloraError):
    """The configuration file or an override is wrong (exit code 2)."""

    status = 500
    type = "config_error"


class ModelError(JsloraError):
    """The base model is missing, unreadable or of an unsupported architecture (exit code 3)."""

    status = 500
    type = "model_error"


BY_TYPE: dict[str, type[JsloraError]] = {
    cls.type: cls
    for cls in (
        InvalidRequest, AdapterRejected, Unauthorized, UnknownModel, Overloaded, RateLimited,
        TooLate, Unavailable, EngineFailed, CorruptOutput, ConfigError, ModelError,
    )
}  # fmt: skip
