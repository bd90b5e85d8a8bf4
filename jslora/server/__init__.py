"""The front end: HTTP on one side, an engine process on the other; it never imports jax.

A request's way: `http` (limits of the connection) → `app` (errors, ids) → `routes` → `auth` →
`body` (strict JSON) → `protocol` (fields and bounds) → `prepare` (tokens, a `Job`) → `generation`
(submit, stream) → `client`, `channel` and `process` (the engine) → `choice` (text) → `writer` and
`openai` (the JSON of the answer).
"""
