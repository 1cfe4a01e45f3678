"""An MCP server on standard input and output, with more tools than anybody wants to read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NUM_TOOLS = 60
WANTED = "change_greeting"
WORDS = "It is one of many, and what it does is told at length, so that all together fill the context. " * 12


def tools() -> list[dict[str, Any]]:
    """The tool that is wanted, and others."""
    schema = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    names = [WANTED, *(f"other_{number}" for number in range(NUM_TOOLS))]
    return [{"name": name, "description": f"{name} of a file. {WORDS}", "inputSchema": schema} for name in names]


def answer(method: str, params: dict[str, Any]) -> dict[str, Any]:
    """The result of a request."""
    if method == "initialize":
        version = params.get("protocolVersion", "2025-06-18")
        return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": {"name": "w", "version": "1"}}
    if method == "tools/list":
        return {"tools": tools()}
    if method == "tools/call" and params["name"] == WANTED:
        path = Path(params["arguments"]["path"])
        path.write_text(path.read_text().replace("hello", "goodbye"))
        return {"content": [{"type": "text", "text": "changed"}]}
    return {}


def main() -> None:
    """Answer line after line."""
    for line in sys.stdin:
        request = json.loads(line)
        if "id" in request:
            result = answer(request["method"], request.get("params") or {})
            print(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}), flush=True)


if __name__ == "__main__":
    main()
