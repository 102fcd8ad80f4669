"""The check of the documents finds what it is for."""

import re
from pkgutil import resolve_name

import pytest

from hiprune_vllm.engine.registration import CLASSES
from hiprune_vllm.models.unserved import UNSERVED
from tools import docs, reference


def complaints(tmp_path, text):
    path = tmp_path / "page.md"
    path.write_text(text)
    return [*docs.dead_links(path), *docs.failures(path)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("# One two\n[a](#one-two) [b](page.md#one-two) [c](https://nowhere.invalid)", 0),
        ("[a](nothing.md)", 1),
        ("# One\n[a](#two)", 1),
        ("# One\n# One\n[a](#one-1)", 0),
        ("![a](nothing.png) `[b](nothing)`\n```\n[c](nothing)\n```", 1),
        ("<!-- docs-check: run -->\n```bash\ntrue\n```", 0),
        ("<!-- docs-check: run -->\n```bash\nfalse\ntrue\n```", 1),
        ("```bash\nfalse\n```", 0),
        ("<!-- docs-check: run -->\n```python\nprint(1)\n```\n"
         "<!-- docs-check: output -->\n```text\n1\n```", 0),
        ("<!-- docs-check: run -->\n```python\nprint(1)\n```\n"
         "<!-- docs-check: output -->\n```text\n2\n```", 1),
    ],
)  # fmt: skip
def test_dead_links_and_failing_commands_are_found(tmp_path, text, found):
    assert len(complaints(tmp_path, text)) == found


def test_no_document_has_a_dead_link():
    paths = docs.documents()
    assert docs.ROOT / "README.md" in paths
    assert not [complaint for path in paths for complaint in docs.dead_links(path)]


def test_every_document_is_one_click_from_the_readme():
    readme = docs.ROOT / "README.md"
    clicked = {
        (readme.parent / link.split("#")[0]).resolve() for link in docs.links(readme.read_text())
    }
    for path in (docs.ROOT / "docs").glob("*.md"):
        assert path in clicked, path.name


def test_marks_are_spelled_right():
    for path in docs.documents():
        text = path.read_text()
        marks = re.findall(r"^<!-- docs-check: \w+ -->$", text, re.MULTILINE)
        assert len(marks) == len(docs._MARKED.findall(text)), path.name


ADAPTERS = {adapter for _, adapter in CLASSES.values()} | {"pixtral:PixtralAdapter"}


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
def test_the_page_of_families_says_what_the_server_says(adapter):
    page = (docs.ROOT / "docs/families.md").read_text()
    about = resolve_name(f"hiprune_vllm.models.{adapter}").about
    for line in (
        f"* token: {about.token}",
        f"* default object layer: {about.layer}",
        f"* dropped besides tokens: {about.dropped or 'nothing'}",
        f"* published: {about.published or 'nothing that we know of'}",
    ):
        assert f"\n{line}" in page


def test_the_page_of_families_names_all_that_are_not_admitted():
    _, _, section = (docs.ROOT / "docs/families.md").read_text().partition("## Not admitted")
    assert set(re.findall(r"`([A-Z]\w+)`", section)) == set(UNSERVED)


def test_the_reference_says_what_the_code_has():
    """`make reference` writes it."""
    page = reference.PAGE.read_text()
    assert set(re.findall(r"<!-- generated: (\w+) -->", page)) == set(reference.TABLES)
    assert reference.written(page) == page


NAMED = re.findall(
    r"`((?:hardening|routes|wishes|operations|engine|models|pruning|facade|plan)\.(?!py`)[\w.]+)`",
    (docs.ROOT / "docs/architecture.md").read_text(),
)


@pytest.mark.parametrize("name", sorted(set(NAMED)))
def test_what_the_walk_names_is_there(name):
    of_server = name.split(".")[0] in ("hardening", "routes", "wishes", "operations")
    assert resolve_name(f"{'hiprune_server' if of_server else 'hiprune_vllm'}.{name}")
