"""Of two releases of vLLM what changed is told where our sources rely on it, and nowhere else."""

import ast
from textwrap import dedent

import pytest

from tools.vllm_release import differences
from tools.vllm_release.sources import Release


@pytest.fixture
def compared(tmp_path):
    """Hook -> its change between two trees, for sources of ours."""

    def compare(old, new, **ours):
        releases = []
        for name, files in (("old", old), ("new", new)):
            for path, text in {"__init__.py": "", **files}.items():
                place = tmp_path / name / "vllm" / path
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(dedent(text))
            releases.append(Release(tmp_path / name))
        hooks = differences.hooks((name, ast.parse(dedent(text))) for name, text in ours.items())
        found = list(differences.changes(*releases, hooks))
        by_name = {one.name.replace("`", ""): one for one in found}
        assert len(by_name) == len(found)
        return by_name

    return compare


def states(changes):
    return {name: one.state for name, one in changes.items()}


def edited(change):
    return [line for line in change.diff if line[0] in "+-"]


TOOLS = """
    def same(): return 1
    def changed(size):
        # An explanation.
        return size
    def told():
        '''One text.'''
        return 3  # why
    def moved(): return 4
    def gone(): return 5
    def unused(): return 6
    table = {"a": 1}
"""
NEW_TOOLS = """
    def same(): return 1
    def changed(size, way=None):
        # Another explanation.
        return size
    def told():
        '''Another text.'''
        return (
            3
        )
    def unused(): return 7
    table = {"a": 1, "b": 2}
"""


def test_a_function_is_unchanged_changed_told_anew_moved_or_gone(compared):
    found = compared(
        {"tools.py": TOOLS},
        {"tools.py": NEW_TOOLS, "other/place.py": "def moved(): return 4\n", "far.py": "moved = 1"},
        ours="from vllm.tools import same, changed, told, moved, gone, table\ngone()",
    )
    assert states(found) == {
        "tools same": "unchanged",
        "tools changed": "4 lines",
        "tools told": "comments or layout alone",
        "tools moved": "**moved to** `other/place` `moved`",
        "tools gone": "**gone**",
        "tools table": "2 lines",
    }
    assert edited(found["tools changed"])[0::2] == [
        "-def changed(size):",
        "+def changed(size, way=None):",
    ]
    assert not found["tools told"].diff


def test_one_of_several_spellings_is_enough_and_lines_that_moved_in_are_no_difference(compared):
    found = compared(
        {"old_place.py": "def start(size):\n    first()\n    return size\n"},
        {"place.py": "def start(size):\n    with this:\n        first()\n    return size\n"},
        ours="""
            def serve():
                try:
                    from vllm.place import start
                except ImportError:
                    from vllm.old_place import start
        """,
    )
    assert states(found) == {"old_place start": "now from `place` `start`, 1 line"}
    assert found["old_place start"].diff[1:] == (
        [" def start(size):", "+    with this:", "         first()", "     return size"]
    )


ENGINE = """
    from vllm.base import Base
    class Engine(Base):
        limit: int = 1
        def __init__(self, size):
            self.size = size
        def run(self): return 1
        def other(self): return 1
""" + "".join(f"    def more{number}(self): ...\n" for number in range(40)).replace(
    "    def", "        def"
)


def changed(text, *edits):
    for before, after in edits:
        assert before in text
        text = text.replace(before, after)
    return text


def test_of_a_class_what_is_overridden_or_used_counts_whatever_base_has_it(compared):
    base = "class Base:\n    def stop(self): return 1\n    def quiet(self): return 1\n"
    found = compared(
        {"engine.py": ENGINE, "base.py": base},
        {
            "engine.py": changed(
                ENGINE,
                ("def run(self): return 1", "def run(self, fast): return 1"),
                ("def other(self): return 1", "def other(self): return 2"),
                ("self.size = size", "self.size = 2 * size"),
                ("limit: int = 1", "limit: int = 2"),
            ),
            "base.py": changed(base, ("return 1", "return 2")),
        },
        mixin="""
            class Mixin:
                def stop(self):
                    self.own()
                    return super().stop() + self.size
        """,
        ours="""
            import mixin
            from vllm.engine import Engine
            class Ours(mixin.Mixin, Engine):
                def run(self, fast): ...
                def own(self): ...
        """,
    )
    assert states(found) == {
        "engine Engine": "4 lines",
        "engine Engine.run": "2 lines",
        "base Base.stop": "2 lines",
    }
    assert found["base Base.stop"].users == ("mixin",)
    # The field and `__init__`, which tells of `self.size` as well.
    assert [line.strip("+- ") for line in edited(found["engine Engine"])] == [
        "limit: int = 1",
        "limit: int = 2",
        "self.size = size",
        "self.size = 2 * size",
    ]


def test_a_class_of_which_something_is_reached_counts_by_that_alone(compared):
    found = compared(
        {"engine.py": ENGINE, "base.py": "class Base:\n    def stop(self): return 1\n"},
        {
            "engine.py": changed(ENGINE, ("limit: int = 1", "limit: int = 2")),
            "base.py": "class Base:\n    def stop(self): return 2\n",
        },
        ours="""
            from vllm.engine import Engine
            NAMES = ("run", "stop", "nothing")
            def patch(engine: Engine):
                for cls in (Engine, *engine.lineage()):
                    for name in NAMES:
                        setattr(cls, name, wrapped(getattr(cls, name)))
                return engine.limit
        """,
    )
    assert states(found) == {
        "engine Engine.run": "unchanged",
        "engine Engine.limit": "2 lines",
        "base Base.stop": "2 lines",
    }


def test_what_a_variable_or_a_field_holds_is_followed(compared):
    files = {
        "config.py": """
            class Pictures:
                rate: float = 0.0
                def is_on(self): return 1
            class Config:
                pictures: "Pictures | None" = None
                plain: Pictures | None = None
        """,
        "registry.py": "from vllm.config import Config\nREGISTRY = Config()\n",
    }
    new = files | {"config.py": changed(files["config.py"], ("return 1", "return 2"))}
    found = compared(
        files, new, ours="from vllm import registry\nregistry.REGISTRY.plain.is_on()\n"
    )
    assert states(found) == {
        "registry REGISTRY": "unchanged",
        "config Config.plain": "unchanged",
        "config Pictures.is_on": "2 lines",
    }


def test_a_method_of_ours_that_a_release_begins_to_have_too_is_told(compared):
    old = "class Engine:\n    def run(self): ...\n"
    found = compared(
        {"engine.py": old},
        {"engine.py": f"{old}    def forget(self): ...\n"},
        ours="""
            from vllm.engine import Engine
            class Ours(Engine):
                def forget(self): ...
        """,
    )
    assert states(found) == {
        "engine Engine": "1 line",
        "engine Engine.forget": "**new in vLLM**, 1 line",
    }


LONG = "\n".join(f"        step({number})" for number in range(60))


def test_a_body_that_went_to_a_new_method_is_compared_with_that(compared):
    found = compared(
        {"engine.py": f"class Engine:\n    def run(self):\n{LONG}\n    def stop(self): ...\n"},
        {
            "engine.py": "class Engine:\n    def run(self):\n        return self.raw()\n"
            f"    def stop(self): ...\n    def raw(self):\n{LONG}\n        step(60)\n"
        },
        ours="from vllm.engine import Engine\nEngine.run = print",
    )
    assert states(found) == {"engine Engine.run": "most of it in `engine` `Engine.raw`, 3 lines"}


def test_a_subclass_that_begins_to_override_is_not_compared_with_its_base(compared):
    files = {"engine.py": "class Engine:\n    def run(self):\n        return 1\n"}
    of_fast = "from vllm.engine import Engine\nclass Fast(Engine):\n    "
    found = compared(
        files | {"fast.py": f"{of_fast}speed = 1\n"},
        files | {"fast.py": f"{of_fast}def run(self):\n        return 2\n"},
        ours="from vllm.fast import Fast\nFast.run",
    )
    assert states(found) == {"engine Engine.run": "**overridden** by `fast` `Fast.run`, 2 lines"}


def test_what_a_hook_calls_is_named_where_that_has_changed(compared):
    tools = "def used(): return 1\ndef unused(): return 1\n"
    engine = """
        from vllm.tools import used
        class Engine:
            def run(self):
                used()
                self.step()
            def step(self): return 1
    """
    found = compared(
        {"tools.py": tools, "engine.py": engine},
        {
            "tools.py": changed(tools, ("return 1", "return 2")),
            "engine.py": changed(engine, ("return 1", "return 2")),
        },
        ours="from vllm.engine import Engine\nEngine.run",
    )
    assert states(found) == {"engine Engine.run": "calls `step` (2), `used` (2)"}


def test_the_report_has_a_table_and_the_differences_of_each_file_of_ours(
    compared, tmp_path, capsys, monkeypatch
):
    compared({"tools.py": TOOLS}, {"tools.py": NEW_TOOLS})
    ours = {
        "a.py": "from vllm.tools import same, told, changed, gone",
        "b.py": "from vllm import tools\ntools.changed",
    }
    trees = [(name, ast.parse(text)) for name, text in ours.items()]
    monkeypatch.setattr(differences, "sources", lambda: trees)
    assert differences.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[2] == "Hooks: 1 unchanged, 3 not."
    assert told[4:10] == [
        "| ours | vLLM's | |",
        "|---|---|---|",
        "| a.py | `tools` `changed` | 4 lines |",
        "| a.py | `tools` `gone` | **gone** |",
        "| a.py | `tools` `told` | comments or layout alone |",
        "| a.py | `same` | unchanged |",
    ]
    assert [line for line in told if line[:2] == "##"] == [
        "## a.py",
        "### `tools` `changed`: 4 lines",
    ]
    assert "Also in b.py." in told


def test_a_folder_without_vllm_is_refused(tmp_path, capsys):
    assert differences.main([str(tmp_path), str(tmp_path)]) == 2
    assert differences.main([]) == 2
    told = capsys.readouterr()
    assert not told.out
    assert f"Needs two folders with vllm, got: {tmp_path} {tmp_path}" in told.err
