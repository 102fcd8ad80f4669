"""The server's key. Not an argument: those go into the report."""

import os

VARIABLE = "LOAD_API_KEY"


def headers() -> dict[str, str]:
    """What goes with every request to the server."""
    key = os.environ.get(VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}
