"""Who a request comes from, as far as remembered prefixes are concerned."""

from __future__ import annotations

from starlette.requests import Request

from vllm_mlx.core.config import Config
from vllm_mlx.core.prompt import tenant_key


def tenant_of(request: Request, config: Config) -> bytes:
    """Key of the tenant named in the header of `--cache-tenant-header`; empty without that setting or header.

    A header sent several times counts as one with the values joined (RFC 9110, section 5.3).
    """
    if config.cache_tenant_header is None:
        return b""
    values = request.headers.getlist(config.cache_tenant_header)
    return tenant_key(", ".join(values)) if values else b""
