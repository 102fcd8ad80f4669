"""What changed between two releases of vLLM where our sources rely on it, as Markdown.

    python -m tools.vllm_release.differences x.y.z                   (from the installed one)
    python -m tools.vllm_release.differences OLD_FOLDER NEW_FOLDER   (each has `vllm` in it)

What we rely on is found in our sources: names that are imported; what is reached, set or asked for
by such a name; and what classes of ours override or use of the vLLM classes that they stand on.
"""

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from enum import IntEnum
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

from tools.vllm_release.environment import installed, python_files
from tools.vllm_release.sources import Definition, Release, bound, imports, sources

SMALL = 40
"""Lines of a class that is shown as a whole, and of a diff that needs no special care."""
CONTEXT = 2
UNCHANGED = "unchanged"
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
VARIABLE = ast.Assign | ast.AnnAssign


class Use(IntEnum):
    """How much of a class matters to us."""

    NAMED = 0
    """That it is there: something of it is reached."""
    TAKEN = 1
    """How it is made: it is called, handed over, derived from."""
    READ = 2
    """All: a test of ours looks at its text."""


class Hook(NamedTuple):
    """A name of vLLM's by each of our spellings, and what we reach from it."""

    spellings: tuple[tuple[str, str | None], ...]
    attributes: tuple[str, ...] = ()

    def reach(self, *names: str) -> "Hook":
        return self._replace(attributes=(*self.attributes, *names))


class Source:
    """A file of ours: what its names stand for, without regard to scopes.

    What that brings together by mistake does not exist in vLLM, and is dropped later.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.classes = {one.name: one for one in ast.walk(tree) if isinstance(one, ast.ClassDef)}
        self.names: defaultdict[str, set[Any]] = defaultdict(set)
        self.instances: defaultdict[str, set[Any]] = defaultdict(set)
        for branches in imports(tree):
            found = [one for branch in branches for one in branch]
            for local in {one.local for one in found}:
                spelled = [(one.module, one.name) for one in found if one.local == local]
                self.names[local].add(
                    Hook(tuple(spelled) if local != "vllm" else (("vllm", None),))
                )
        self.imported = set().union(*self.names.values())
        for _ in range(3 if self.names else 0):  # a name of a name of a name
            for node in ast.walk(tree):
                self._bind(node)

    def _bind(self, node: Any) -> None:
        if isinstance(node, ast.arg):
            for one in ast.walk(node.annotation) if node.annotation else ():
                self.instances[node.arg] |= self.values(one)
            return
        value = getattr(node, "iter", None) or getattr(node, "value", None)
        for target in getattr(node, "targets", None) or [getattr(node, "target", None)]:
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=False))
            for name, given in pairs:
                if isinstance(name, ast.Name) and given is not None:
                    self.names[name.id] |= self.values(given)

    def values(self, node: Any) -> set[Any]:
        """Hooks and texts that an expression, or a member of it, may be."""
        members: Iterable[Any] = ()
        match node:
            case ast.Name():
                return self.names[node.id] | self.instances[node.id]
            case ast.Constant(value=str(text)):
                return {text}
            case ast.Attribute():
                return {one.reach(node.attr) for one in self.hooks_of(node.value)}
            case ast.Call(args=[of, name, *_]) if ast.unparse(node.func).endswith("attr"):
                texts = [one for one in self.values(name) if isinstance(one, str)]
                return {one.reach(text) for one in self.hooks_of(of) for text in texts}
            case ast.Tuple() | ast.List() | ast.Set():
                members = node.elts
            case ast.Dict():
                members = filter(None, node.keys)
            case ast.Starred():
                members = [node.value]
        return set().union(*map(self.values, members))

    def hooks_of(self, *nodes: ast.AST) -> set[Hook]:
        return {one for node in nodes for one in self.values(node) if isinstance(one, Hook)}

    def hooks(self) -> Iterator[tuple[Hook, Use]]:
        yield from ((hook, Use.NAMED) for hook in self.imported)
        for node in ast.walk(self.tree):
            used, use = [], Use.TAKEN
            if isinstance(node, ast.ClassDef):
                used = node.bases
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                used = [] if called.endswith(("attr", "vars")) else [node.func, *node.args]
                use = Use.READ if called.endswith("getsource") else Use.TAKEN
            if isinstance(node, ast.Name | ast.Attribute | ast.Call):
                yield from ((hook, Use.NAMED) for hook in self.hooks_of(node))
            for one in used:
                if not (isinstance(one, ast.Name) and self.instances[one.id]):
                    yield from ((hook, use) for hook in self.hooks_of(one))


def hooks(files: Iterable[tuple[str, ast.Module]]) -> dict[Hook, dict[str, Use]]:
    """Hook -> the files of ours that use it, in their order, and how."""
    read = {name: Source(tree) for name, tree in files}
    used = [(name, *one) for name, source in read.items() for one in source.hooks()]
    order = {name: place for place, name in enumerate(read)}
    found: defaultdict[Hook, dict[str, Use]] = defaultdict(dict)
    for name, hook, use in sorted([*used, *_inherited(read)], key=lambda one: order[one[0]]):
        found[hook][name] = max(use, found[hook].get(name, Use.NAMED))
    return found


def _inherited(read: dict[str, Source]) -> Iterator[tuple[str, Hook, Use]]:
    """What classes of ours override or use of those of vLLM's that they are mixed with."""

    def family(file: str, name: str) -> list[tuple[str, ast.ClassDef]]:
        files = [file] if name in read[file].classes else read
        found = [(one, read[one].classes[name]) for one in files if name in read[one].classes]
        bases = [
            (one, ast.unparse(base).rpartition(".")[2]) for one, cls in found for base in cls.bases
        ]
        return found + [member for base in bases for member in family(*base)]

    for members in [family(file, name) for file, one in read.items() for name in one.classes]:
        bases = {hook for file, cls in members for hook in read[file].hooks_of(*cls.bases)}
        for file, cls in members if bases else ():
            paths = [(base, path) for base in bases for path in _used(cls)]
            yield from ((file, base.reach(*path), Use.TAKEN) for base, path in paths)


def _used(cls: ast.ClassDef) -> set[tuple[str, ...]]:
    """Names that a class has, and those that it reaches from `self`, `cls` and `super()`."""
    reached = (ast.unparse(node) for node in ast.walk(cls) if isinstance(node, ast.Attribute))
    paths = (one.split(".") for one in reached)
    return {(name,) for name, _ in bound(cls.body, typed=True)} | {
        tuple(path[1:]) for path in paths if path[0] in ("self", "cls", "super()")
    }


class Pair(NamedTuple):
    """A hook in both releases; `moved` where none of our spellings finds it in the new one."""

    was: Definition | None
    now: Definition | None
    moved: bool


def pair(old: Release, new: Release, hook: Hook) -> Pair:
    def found(release: Release) -> Definition | None:
        return next(filter(None, (release.find(*one) for one in hook.spellings)), None)

    was, now = found(old), found(new)
    while was and not was.nodes and hook.attributes:  # of a module: a name like others
        first, *rest = hook.attributes
        hook = Hook(((was.module, first),), tuple(rest))
        was, now = found(old), found(new)
    moved = was is not None and now is None
    if was and moved:
        name = was.name or was.module.rpartition(".")[2]
        places = [new.find(place, was.name) or Definition(place) for place in new.places(name)]
        now = _nearest(text(old, was), places, new)
    for name in hook.attributes:
        was = was and old.attribute(was, name)
        now = now and new.attribute(now, name)
    return Pair(was, now, moved and now is not None and not hook.attributes)


def _nearest(
    lines: list[str], places: list[Definition], release: Release, *, least: float = 0
) -> Definition | None:
    """The definition that is most like these lines: of 1, as much as `least`."""
    like = [(SequenceMatcher(None, lines, text(release, one)).ratio(), one) for one in places]
    likeness, found = max(like, key=lambda one: one[0], default=(0, None))
    return found if likeness >= least else None


def shown(definition: Definition | None, use: Use) -> tuple[Any, ...]:
    """The nodes of a definition that matter to us."""
    if definition is None or not definition.is_class:
        return definition.nodes if definition else ()
    cls = definition.nodes[0]
    if use != Use.TAKEN or cls.end_lineno - cls.lineno < SMALL:
        return definition.nodes if use else ()
    body = [one for one in cls.body if not isinstance(one, FUNCTION) or one.name == "__init__"]
    return (*cls.decorator_list, *cls.bases, *cls.keywords, *body)


def text(
    release: Release, definition: Definition | None, nodes: Sequence[Any] | None = None
) -> list[str]:
    """The lines that a definition, or nodes of it, are on."""
    if definition is None:
        return []
    lines = release.lines(definition.module)
    numbers = {
        number
        for node in (definition.nodes if nodes is None else nodes)
        for start in (node, *getattr(node, "decorator_list", ()))
        for number in range(start.lineno, node.end_lineno + 1)
    }
    return dedent("\n".join(lines[number - 1] for number in sorted(numbers))).splitlines()


class _WithoutTexts(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node


def meaning(nodes: Iterable[Any]) -> list[str]:
    """Without docstrings, comments and layout."""
    return [ast.unparse(_WithoutTexts().visit(ast.parse(ast.unparse(node)))) for node in nodes]


def diff(before: list[str], after: list[str]) -> list[str]:
    """Unified; lines that are only indented anew count as the same."""
    stripped = [[line.strip() for line in lines] for lines in (before, after)]
    found = []
    for group in SequenceMatcher(None, *stripped, autojunk=False).get_grouped_opcodes(CONTEXT):
        found.append(f"@@ -{group[0][1] + 1} +{group[0][3] + 1} @@")
        for kind, a, b, c, d in group:
            found += [f" {line}" for line in after[c:d]] if kind == "equal" else ()
            found += [f"-{line}" for line in before[a:b]] if kind in ("replace", "delete") else ()
            found += [f"+{line}" for line in after[c:d]] if kind in ("replace", "insert") else ()
    return found


def _count(lines: Iterable[str]) -> int:
    return sum(line[0] in "+-" for line in lines)


class Change(NamedTuple):
    """A hook as a reader sees it: the files of ours, its name, what became of it, its diff."""

    users: tuple[str, ...]
    name: str
    state: str
    diff: Sequence[str] = ()


def changes(old: Release, new: Release, found: dict[Hook, dict[str, Use]]) -> Iterator[Change]:
    """Each hook once; what is shown with its class is not told by itself."""
    pairs: defaultdict[Pair, dict[str, Use]] = defaultdict(dict)
    for hook, users in found.items():
        both = pair(old, new, hook)
        for user, use in users.items():
            pairs[both][user] = max(use, pairs[both].get(user, Use.NAMED))
    covered = {
        id(inner)
        for both, users in pairs.items()
        for one in both[:2]
        if one and one.is_class
        for part in shown(one, min(Use.TAKEN, max(users.values())))
        for inner in ast.walk(part)
        if inner is not one.nodes[0]
    }
    for both, users in pairs.items():
        was, now, moved = both
        if was and now and not moved:
            nodes = (*was.nodes, *now.nodes) if shown(now, max(users.values())) else ()
            if covered.issuperset(map(id, nodes)) or was.module == "vllm._version":
                continue
        if was or now:
            yield _change(old, new, both, users)


def _change(old: Release, new: Release, both: Pair, users: dict[str, Use]) -> Change:
    was, now, moved = both
    name, use = _name(was or now), max(users.values())
    if now is None:
        return Change(tuple(users), name, "**gone**")
    before, after = shown(was, use), shown(now, use)
    states, told = [], []
    if was is None:
        states.append("**new in vLLM**")
    elif moved:
        states.append(f"**moved to** {_name(now)}")
    elif name != _name(now) and _is_in(new, was):
        states.append(f"**overridden** by {_name(now)}")
        before = ()
    elif name != _name(now):
        states.append(f"now from {_name(now)}")
    old_lines, lines = text(old, was, before), text(new, now, after)
    if old_lines != lines and meaning(before) == meaning(after):
        states.append("comments or layout alone")
    elif old_lines != lines:
        told = diff(old_lines, lines)
        rest = _split_off(old, new, both) if len(told) > SMALL else None
        if rest:
            states.append(f"most of it in {_name(rest)}")
            told = diff(old_lines, [*lines, *text(new, rest)])
        count = _count(told)
        states.append(f"{count} line{'s' * (count != 1)}")
        if count > SMALL and (isinstance(after[0], VARIABLE) or (use == Use.READ and now.is_class)):
            states.append("not shown")
            told = []
    if below := _below(old, new, both, after):
        states.append(f"calls {', '.join(below)}")
    return Change(tuple(users), name, ", ".join(states) or UNCHANGED, told)


def _is_in(release: Release, one: Definition) -> bool:
    """Whether a definition of another release is at its place in this one as well."""
    scope = release.scope(one)
    found = release.attribute(scope, one.name.rpartition(".")[2]) if scope else None
    return found is not None and (found.module, found.name) == (one.module, one.name)


def _split_off(old: Release, new: Release, both: Pair) -> Definition | None:
    """A new method beside a changed one that is more like it than what has its name."""
    was, now, _ = both
    scopes = was and old.scope(was), now and new.scope(now)
    if not all(scope and scope.is_class for scope in scopes):
        return None
    known, names = old.members(scopes[0])[0], new.members(scopes[1])[0]
    beside = [
        Definition(now.module, f"{scopes[1].name}.{name}", tuple(nodes))
        for name, nodes in names.items()
        if name not in known
    ]
    found = _nearest(text(old, was), [now, *beside], new, least=0.5)
    return found if found != now else None


def _below(old: Release, new: Release, both: Pair, nodes: Iterable[Any]) -> list[str]:
    """What a hook calls by name or of its own class that has changed, and by how many lines."""
    found = set()
    for node in (one for part in nodes for one in ast.walk(part) if isinstance(one, ast.Call)):
        owner, _, name = ast.unparse(node.func).rpartition(".")
        was, now = _called(old, both.was, owner, name), _called(new, both.now, owner, name)
        lines = text(old, was), text(new, now)
        if was and now and lines[0] != lines[1] and meaning(was.nodes) != meaning(now.nodes):
            found.add(f"`{name}` ({_count(diff(*lines))})")
    return sorted(found)


def _called(release: Release, by: Definition | None, owner: str, name: str) -> Definition | None:
    if by is None or owner not in ("", "self", "cls"):
        return None
    scope = by if by.is_class else release.scope(by)
    found = scope and release.attribute(scope if owner else Definition(by.module), name)
    return found if found and found.nodes and isinstance(found.nodes[0], FUNCTION) else None


def _name(definition: Definition | None) -> str:
    assert definition is not None
    path = definition.module.removeprefix("vllm.").replace(".", "/")
    return f"`{path}` `{definition.name}`" if definition.name else f"`{path}`"


def report(old: Release, new: Release, files: Iterable[tuple[str, ast.Module]]) -> str:
    by_user: defaultdict[str, list[Change]] = defaultdict(list)
    for one in changes(old, new, hooks(files)):
        by_user[one.users[0]].append(one)
    table, diffs, counts = [], [], Counter[bool]()
    for user, found in by_user.items():
        counts.update(one.state == UNCHANGED for one in found)
        rest = sorted(one.name.split()[-1] for one in found if one.state == UNCHANGED)
        changed = sorted((one for one in found if one.state != UNCHANGED), key=lambda one: one[1:3])
        table += [f"| {user} | {one.name} | {one.state} |" for one in changed]
        table += [f"| {user} | {', '.join(rest)} | {UNCHANGED} |"] if rest else ()
        diffs += [f"## {user}", ""] if any(one.diff for one in changed) else ()
        for one in changed:
            also = f"\n\nAlso in {', '.join(one.users[1:])}." if one.users[1:] else ""
            title = f"### {one.name}: {one.state}{also}"
            diffs += [title, "", "```diff", *one.diff, "```", ""] if one.diff else ()
    told = f"Hooks: {counts[True]} unchanged, {counts[False]} not."
    head = [f"# {old.folder} -> {new.folder}", "", told, "", "| ours | vLLM's | |", "|---|---|---|"]
    return "\n".join([*head, *table, "", *diffs])


def main(arguments: Sequence[str]) -> int:
    if len(arguments) == 1:
        folders = [installed().parent, python_files(arguments[0])]
    else:
        folders = [Path(one) for one in arguments]
    if len(folders) != 2 or not all((one / "vllm" / "__init__.py").is_file() for one in folders):
        sys.stderr.write(f"{__doc__}\nNeeds two folders with vllm, got: {' '.join(arguments)}\n")
        return 2
    old, new = map(Release, folders)
    sys.stdout.write(report(old, new, sources()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
