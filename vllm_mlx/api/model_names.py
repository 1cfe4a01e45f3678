"""The names under which requests may ask for the served model."""

from __future__ import annotations

from fnmatch import fnmatchcase

from vllm_mlx.core import log
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import NotFound

_log = log.get_logger("api")
DEFAULT_MODEL = "default"
"""A name for whatever model is served."""
CLOUD_PATTERNS = ("claude-*", "gpt-*", "chatgpt-*", "codex-*", "o[0-9]", "o[0-9]-*")
"""Names of cloud models, which clients ask for unless they are told otherwise."""
_MAX_NOTICES = 100
"""Names that are remembered as told; names come from clients and have no end."""
_MAX_SHOWN = 100
"""Characters of one."""


class ModelNames:
    """Knows the served model's names. One per server, used on the event loop."""

    def __init__(self, config: Config) -> None:
        self._served = config.model_name
        self._own = frozenset((config.model_name, config.model, DEFAULT_MODEL))
        given = tuple(pattern.lower() for pattern, _ in config.alias_rules)
        self._patterns = given + (CLOUD_PATTERNS if config.model_aliases else ())
        self._noticed: set[str] = set()

    def check(self, name: str | None) -> None:
        """Raise NotFound unless `name` is a name or an alias of the served model; None is. Aliases are logged once."""
        if name is None or name in self._own:
            return
        if not any(fnmatchcase(name.lower(), pattern) for pattern in self._patterns):
            message = f"The model '{name[:_MAX_SHOWN]}' does not exist. Available model: '{self._served}'."
            raise NotFound(message, param="model", code="model_not_found")
        shown = name[:_MAX_SHOWN]
        if shown not in self._noticed and len(self._noticed) < _MAX_NOTICES:
            self._noticed.add(shown)
            _log.info("requests for model %r are answered by %r (--no-model-aliases refuses them)", shown, self._served)
