"""The small artifact of the runtime's tests, for programs under a sanitizer."""

from ..runtime.conftest import (  # noqa: F401 (fixtures)
    artifact,
    fake_model,
    library_bytes,
    tokenizer_json,
    write,
)
