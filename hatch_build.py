"""Metadata that depends on where the repository is: its links, and those of the long description.

A registry shows README.md without the files beside it. On a runner of a forge's the address comes
with the environment; elsewhere HIPRUNE_REPOSITORY may name it, and without one links to files are
plain text.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://|#|mailto:)([^)\s]+)\)")
"""A link to a file of the repository, or a picture of it."""


def repository(environment: dict[str, str]) -> str:
    """The address of the repository's pages, without a slash at its end; empty where unknown."""
    if address := environment.get("HIPRUNE_REPOSITORY", ""):
        return address.rstrip("/")
    server, name = environment.get("GITHUB_SERVER_URL"), environment.get("GITHUB_REPOSITORY")
    return f"{server}/{name}" if server and name else ""


def long_description(text: str, address: str, revision: str) -> str:
    """README.md with links that lead somewhere from another page.

    Args:
        address: see `repository`.
        revision: tag or commit whose files are meant.
    """

    def absolute(found: re.Match[str]) -> str:
        mark, words, target = found.groups()
        if not address:
            return words
        kind = "raw" if mark else "blob"
        return f"{mark}[{words}]({address}/{kind}/{revision}/{target})"

    return LINK.sub(absolute, text)


class CustomMetadataHook(MetadataHookInterface):
    """What hatchling asks for the metadata that pyproject.toml calls dynamic."""

    def update(self, metadata: dict[str, object]) -> None:
        address = repository(dict(os.environ))
        text = (Path(self.root) / "README.md").read_text()
        revision = os.environ.get("GITHUB_REF_NAME") or "main"
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": long_description(text, address, revision),
        }
        metadata["urls"] = (
            {
                "Homepage": address,
                "Documentation": f"{address}#readme",
                "Changelog": f"{address}/blob/{revision}/CHANGELOG.md",
                "Issues": f"{address}/issues",
            }
            if address
            else {}
        )
