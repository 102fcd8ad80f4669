"""What our sources import of vLLM, and where a release has it: by syntax trees, nothing runs."""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OURS = ("vllm_plugin", "server", "loadtests", "tests/contract")
"""Folders whose sources have to fit every release that is served."""


@dataclass(frozen=True)
class Import:
    """What a line of ours takes from vLLM; `name` is None for a module as such."""

    local: str
    module: str
    name: str | None
    line: int


@dataclass(frozen=True)
class Definition:
    """What makes a name in a release: statements (or a value); none for a module."""

    module: str
    name: str = ""
    nodes: tuple[Any, ...] = ()

    @property
    def is_class(self) -> bool:
        return bool(self.nodes) and isinstance(self.nodes[0], ast.ClassDef)


def sources(*folders: str, root: Path = ROOT) -> Iterator[tuple[str, ast.Module]]:
    """Our files by their names below `root`, as syntax trees."""
    for folder in folders or OURS:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), ast.parse(path.read_text())


def imports(node: ast.AST) -> Iterator[list[list[Import]]]:
    """Everything that is imported of vLLM, in functions too: branches, of which one has to do.

    Most have one branch with one import. `try ... except ImportError` has several: spellings for
    several releases, or an empty branch where the source can do without.
    """
    if isinstance(node, ast.Import):
        names = [one for one in node.names if _is_vllms(one.name)]
        yield from ([[Import(one.asname or "vllm", one.name, None, node.lineno)]] for one in names)
    elif isinstance(node, ast.ImportFrom) and _is_vllms(module := node.module or ""):
        for one in node.names:
            yield [[Import(one.asname or one.name, module, one.name, node.lineno)]]
    elif isinstance(node, ast.Try) and any(map(_is_for_absence, node.handlers)):
        if any(branches := _alternatives(node)):
            yield branches
        for child in (*node.orelse, *node.finalbody):
            yield from imports(child)
    else:
        for child in ast.iter_child_nodes(node):
            yield from imports(child)


def _is_vllms(module: str) -> bool:
    return module.partition(".")[0] == "vllm"


def _is_for_absence(handler: ast.ExceptHandler) -> bool:
    caught = ast.unparse(handler.type) if handler.type else ""
    return bool(re.search(r"\b(Import|ModuleNotFound)Error\b", caught))


def _alternatives(node: ast.Try) -> list[list[Import]]:
    """The body of a `try`, and what each handler of an absence has in its place."""
    branches = [_needed(node.body)]
    for handler in filter(_is_for_absence, node.handlers):
        inside = [found for statement in handler.body for found in imports(statement)]
        if len(inside) == 1:  # maybe a `try` with alternatives of its own
            branches += inside[0]
        elif not isinstance(handler.body[-1], ast.Raise):
            branches.append(_needed(handler.body))
    return branches


def _needed(statements: Iterable[ast.stmt]) -> list[Import]:
    return [one for node in statements for branches in imports(node) for one in branches[0]]


def bound(nodes: Iterable[ast.AST], *, typed: bool = False) -> Iterator[tuple[str, ast.AST]]:
    """Names that statements make, and the statements; of `if TYPE_CHECKING` only where `typed`."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((one.asname or one.name.partition(".")[0], node) for one in node.names)
        elif isinstance(node, ast.If) and not typed and _is_for_types(node.test):
            yield from bound(node.orelse)
        else:
            for child in ast.iter_child_nodes(node):
                if not isinstance(child, ast.expr):
                    yield from bound([child], typed=typed)
                    continue
                for one in ast.walk(child):
                    if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store):
                        yield one.id, node


def _is_for_types(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


class Release:
    """The Python files of a release of vLLM, in a folder that has `vllm` in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("lines", "names", "lineage", "members"):  # each is asked for many times
            setattr(self, name, cache(getattr(self, name)))

    def file(self, module: str) -> Path | None:
        path = self.folder.joinpath(*module.split("."))
        places = (path / "__init__.py", path.parent / f"{path.name}.py", path)
        return next((place for place in places if place.exists()), None)

    def lines(self, module: str) -> list[str]:
        path = self.file(module)
        return path.read_text().splitlines() if path and path.is_file() else []

    def names(self, module: str) -> dict[str, list[Any]]:
        """The names that a module has at run time, and what makes them."""
        body = ast.parse("\n".join(self.lines(module))).body
        found = _by_name(bound(body))
        for getter in found.get("__getattr__", ()):  # makes names when they are asked for
            spoken_of = [(c.value, getter) for c in ast.walk(getter) if isinstance(c, ast.Constant)]
            late = _by_name((*bound(body, typed=True), *_keys(body), *spoken_of))
            found = {name: nodes[:1] for name, nodes in late.items()} | found
        return found

    def find(
        self, module: str, name: str | None = None, seen: frozenset[Any] = frozenset()
    ) -> Definition | None:
        """What makes a module's name, in whichever module of the release that is.

        What comes from another package is made by the import. `seen` was asked for already.
        """
        if self.file(module) is None or (module, name) in seen:
            return None
        if name is None or name == "*":
            return Definition(module)
        made = self.names(module).get(name, [])
        for node in (*made, *self._stars(module, name)):
            origin, named = self._origin(module, node, name)
            if not _is_vllms(origin or ""):
                own = [one for one in made if not isinstance(one, ast.Import | ast.ImportFrom)]
                return Definition(module, name, (node,) if origin else tuple(own))
            if found := self.find(origin, named, seen | {(module, name)}):
                return found
        return self.find(f"{module}.{name}")

    def _origin(self, module: str, node: Any, name: str) -> tuple[str, str | None]:
        """The module, and the name in it, that `name` is brought from; "" where it is made."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):  # "module:name"
            origin, _, named = node.value.partition(":")
            return f"{module}{origin}" if origin[:1] == "." else origin, named or name
        if isinstance(node, ast.Import):
            whole = {one.asname: one.name for one in node.names}
            return whole.get(name, name), None
        if not isinstance(node, ast.ImportFrom):
            return "", None
        path, above = self.file(module), module.split(".")
        is_package = path is not None and path.name == "__init__.py"
        above = above[: len(above) - node.level + is_package] if node.level else []
        named = {one.asname or one.name: one.name for one in node.names}.get(name, name)
        return ".".join([*above, *filter(None, [node.module])]), named

    def _stars(self, module: str, name: str) -> Iterator[ast.ImportFrom]:
        """Imports of all of a module of vLLM's that bring this name, too."""
        for node in self.names(module).get("*", ()):
            origin, _ = self._origin(module, node, name)
            listed = self.names(origin).get("__all__", ()) if _is_vllms(origin) else ()
            shared = {one.value for n in listed for one in ast.walk(n) if hasattr(one, "value")}
            if _is_vllms(origin) and (name in shared if shared else name[0] != "_"):
                yield node

    def attribute(self, of: Definition, name: str) -> Definition | None:
        """What makes `of.name`; `of` is a module, a class, or an instance of one."""
        if not of.nodes:
            return self.find(of.module, name)
        classes = [one for cls in self._classes(of) for one in self.lineage(cls)]
        for on_instance in (False, True):
            for cls in classes:
                if nodes := self.members(cls)[on_instance].get(name):
                    return Definition(cls.module, f"{cls.name}.{name}", tuple(nodes))
        return None

    def scope(self, of: Definition) -> Definition | None:
        """The class that a definition is in, or its module."""
        outside, _, _ = of.name.rpartition(".")
        return self.find(of.module, outside) if outside else Definition(of.module)

    def _classes(self, of: Definition) -> list[Definition]:
        """The class itself, or those that a variable's annotation or first value names."""
        if of.is_class:
            return [of]
        value = getattr(of.nodes[0], "value", None)
        hint = getattr(of.nodes[0], "annotation", None) or getattr(value, "func", None)
        found = [self._named(of.module, one) for one in ast.walk(hint)] if hint else []
        return [one for one in found if one and one.is_class]

    def _named(self, module: str, node: ast.AST) -> Definition | None:
        match node:
            case ast.Name():
                return self.find(module, node.id)
            case ast.Attribute() if of := self._named(module, node.value):
                return self.attribute(of, node.attr)
            case ast.Subscript():
                return self._named(module, node.value)
        return None

    def lineage(self, cls: Definition) -> list[Definition]:
        """A class and its bases within vLLM, in the order in which they are asked for a name."""
        bases = [self._named(cls.module, base) for base in cls.nodes[0].bases]
        found = [
            cls,
            *(one for base in bases if base and base.is_class for one in self.lineage(base)),
        ]
        return [one for i, one in enumerate(found) if one not in found[i + 1 :]]

    def members(self, cls: Definition) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """What makes the names of a class, and those that its methods give to an instance."""
        on_self = (
            (target.attr, node)
            for node in ast.walk(cls.nodes[0])
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in getattr(node, "targets", None) or [node.target]
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
        )
        return _by_name(bound(cls.nodes[0].body, typed=True)), _by_name(on_self)

    def places(self, name: str) -> list[str]:
        """Modules that make this name, or have it."""
        made = re.compile(rf"^[ \t]*((async )?def |class )?{name}\b", re.MULTILINE)
        found = []
        for path in sorted((self.folder / "vllm").rglob("*.py")):
            parts = path.relative_to(self.folder).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if module.endswith(f".{name}"):
                found.append(module)
            elif name in (text := path.read_text()) and made.search(text):
                definition = self.find(module, name)
                found += [module] if definition and definition.module == module else []
        return found

    def missing(self, name: str, tree: ast.Module) -> list[str]:
        """What our file `name` imports and the release has not, by line, and where it is now."""
        told = []
        for branches in imports(tree):
            lacking = [[i for i in b if not self.find(i.module, i.name)] for b in branches]
            for one in [i for branch in lacking for i in branch] if all(lacking) else ():
                sought = one.name or one.module.rpartition(".")[2]
                has_module = self.file(one.module) is not None
                lacks = f"{one.module} has no {sought}" if has_module else f"no {one.module}"
                places = ", ".join(self.places(sought)) or "nowhere"
                told.append(f"{name}:{one.line}: {lacks}; {sought} is in: {places}")
        return told


def _by_name(pairs: Iterable[tuple[str, Any]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name, node in pairs:
        found.setdefault(name, []).append(node)
    return found


def _keys(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """Keys of a module's dictionaries."""
    for value in (getattr(statement, "value", None) for statement in body):
        if isinstance(value, ast.Dict):
            pairs = zip(value.keys, value.values, strict=True)
            yield from ((key.value, one) for key, one in pairs if isinstance(key, ast.Constant))
