"""`make docs-check`: dead links and anchors in the documents, and commands that no longer run.

A fenced block under the line `<!-- docs-check: run -->` is run in the repository's root (bash, or
python where the fence says so). A block under `<!-- docs-check: output -->` is what the one before
it printed, to the letter.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARKED = re.compile(
    r"^<!-- docs-check: (run|output) -->\n```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
TIMEOUT_S = 300


def documents() -> list[Path]:
    """Every Markdown file that is in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def anchors(text: str) -> set[str]:
    """What GitHub names the headings of a document."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", _FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


def links(text: str) -> list[str]:
    """Targets of links and pictures, not those in code."""
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text)))


def dead_links(path: Path) -> Iterator[str]:
    """Complaints about links of a document that lead nowhere in the repository."""
    text = path.read_text()
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists():
            yield f"{path.name}: {link} is not there"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text()):
            yield f"{path.name}: {link}: no such heading"


def dead_addresses(path: Path) -> Iterator[str]:
    """Complaints about web addresses that do not answer."""
    for link in links(path.read_text()):
        if not link.startswith("http"):
            continue
        try:
            with urlopen(Request(link, headers={"User-Agent": "docs-check"}), timeout=20):
                pass
        except OSError as error:
            yield f"{path.name}: {link}: {error}"


def failures(path: Path) -> Iterator[str]:
    """Runs what is marked, in order; complaints about what fails or prints something else."""
    printed = ""
    for kind, language, code in _MARKED.findall(path.read_text()):
        if kind == "output":
            if printed.rstrip() != code.rstrip():
                yield f"{path.name}: expected\n{code}got\n{printed}"
            continue
        interpreter = {"python": [sys.executable, "-c"]}.get(language, ["bash", "-euc"])
        began = time.monotonic()
        ran = subprocess.run(
            [*interpreter, code], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        seconds = time.monotonic() - began
        first = code.strip().splitlines()[0]
        print(f"{path.name}: ran in {seconds:.1f} s: {first}", flush=True)
        printed = ran.stdout
        if ran.returncode:
            yield f"{path.name}: status {ran.returncode} from\n{code}{ran.stdout}{ran.stderr}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.docs", description=__doc__)
    parser.add_argument("--online", action="store_true", help="web addresses, too")
    online = parser.parse_args().online
    complaints: list[str] = []
    paths = documents()
    for path in paths:
        complaints += dead_links(path)
        complaints += failures(path)
        complaints += dead_addresses(path) if online else []
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    print(f"{len(paths)} documents, {len(complaints)} complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
