"""What of a release cannot run over the compiled CPU extensions of an older one.

    python -m tools.vllm_release.gaps FOLDER_OF_THE_OLDER_PACKAGE_VLLM

in an environment that `environment.py` made. Prints what is missing, and ends with 1 where that is
an operator that the CPU backend calls.
"""

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

PREFIX = "torch.ops._"  # namespaces of compiled operators; others are registered by Python


@dataclass(frozen=True)
class Call:
    """A call of a compiled operator, or its name without a call (`arguments` is None)."""

    operator: str  # "_C::rms_norm"
    file: str
    function: str  # qualified
    line: int
    arguments: int | None = None

    @property
    def place(self) -> tuple[str, str]:
        return self.file, self.function

    def __str__(self) -> str:
        return f"{self.operator} ({self.file}:{self.line}, {self.function or 'module'})"


def calls(package: Path) -> Iterator[Call]:
    """Everywhere that a package of Python files names a compiled operator."""
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        if PREFIX in text:
            yield from _calls(ast.parse(text), str(path.relative_to(package)), "")


def _calls(node: ast.AST, file: str, function: str) -> Iterator[Call]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        function = f"{function}.{node.name}".lstrip(".")
    called = node.func if isinstance(node, ast.Call) else None
    if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(PREFIX):
        parts = ast.unparse(node).split(".")[2:]
        if len(parts) == 2:
            yield Call("::".join(parts), file, function, node.lineno)
    elif isinstance(called, ast.Attribute) and ast.unparse(called).startswith(PREFIX):
        assert isinstance(node, ast.Call)
        starred = any(isinstance(one, ast.Starred) for one in node.args)
        known = not starred and all(one.arg for one in node.keywords)
        count = len(node.args) + len(node.keywords) if known else None
        operator = "::".join(ast.unparse(called).split(".")[2:4])
        yield Call(operator, file, function, node.lineno, count)
        for child in (*node.args, *node.keywords):
            yield from _calls(child, file, function)
        return
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, file, function)


def missing(new: Iterable[Call], old: Iterable[Call], registered: Mapping[str, Any]) -> list[Call]:
    """Calls of the newer release that the CPU backend reaches and the extensions do not have.

    What the older release calls without having it is for other devices. Of the rest the CPU's is
    what says so in a name, and what stands where the older release called an operator that the
    extensions have.
    """
    old = list(old)
    others = {call.operator for call in old if call.operator not in registered}
    served = {call.place for call in old if call.operator in registered}
    return [
        call
        for call in new
        if call.operator not in registered
        and call.operator not in others
        and ("cpu" in "/".join((call.operator, *call.place)).lower() or call.place in served)
    ]


def misfits(
    new: Iterable[Call], old: Iterable[Call], registered: Mapping[str, tuple[int, int]]
) -> list[Call]:
    """Calls with more or fewer arguments than the extensions' operator takes, new ones only."""

    def wrong(call: Call) -> bool:
        if call.arguments is None or call.operator not in registered:
            return False
        fewest, most = registered[call.operator]
        return not fewest <= call.arguments <= most

    before = {(call.operator, call.arguments) for call in old if wrong(call)}
    return [call for call in new if wrong(call) and (call.operator, call.arguments) not in before]


def registrations() -> dict[str, tuple[int, int]]:
    """Operators of the extensions that this machine loads, and how many arguments each takes."""
    import torch
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return {
        schema.name: (
            sum(not one.has_default_value() for one in schema.arguments),
            len(schema.arguments),
        )
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("_")
    }


def unmet(distribution: str) -> Iterator[str]:
    """What a distribution asks for and the environment has otherwise, or not at all."""
    for text in requires(distribution) or []:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            yield f"{wanted.name}{wanted.specifier} (not here)"
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            yield f"{wanted.name}{wanted.specifier} ({found} here)"


def main(older: Path) -> int:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    new, old = list(calls(Path(spec.origin).parent)), list(calls(older))
    registered = registrations()
    lost, other = missing(new, old, registered), misfits(new, old, registered)
    print(f"vllm {version('vllm')} over extensions with {len(registered)} operators")
    for title, found in (
        ("calls of the CPU backend that they do not have", lost),
        ("calls with other arguments than they take, which fail", other),
        ("requirements that are not met, as the extensions' PyTorch stays", list(unmet("vllm"))),
    ):
        print(f"{title}: {len(found) or 'none'}", *found, sep="\n    ")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
