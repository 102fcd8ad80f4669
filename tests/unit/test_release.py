"""The version is in one place, and every file that repeats it follows."""

import pytest

from tools import release


def test_every_image_is_named_by_the_version_of_the_package():
    assert release.versions() == ""
    for name in release.FOLLOWERS:
        assert release.named(release.ROOT / name), f"{name} names none"


@pytest.mark.parametrize(
    ("text", "complains"),
    [
        ("# Changelog\n\n## 1.2.3 (2026-01-31)\n\n- New.\n", False),
        ("# Changelog\n\n## 1.2.3 (unreleased)\n\n- New.\n", True),
        ("# Changelog\n\n## 1.2.2 (2026-01-31)\n\n- New.\n", True),
        ("# Changelog\n\n## 1.2.3 (2026-01-31)\n\n## 1.2.2 (2026-01-30)\n\n- Old.\n", True),
    ],
)
def test_a_release_has_a_dated_entry_in_the_changelog(text, complains, monkeypatch, tmp_path):
    (tmp_path / "CHANGELOG.md").write_text(text)
    monkeypatch.setattr(release, "ROOT", tmp_path)
    assert bool(release.changelog("1.2.3")) == complains


def test_the_changelog_begins_with_the_version_of_the_package():
    text = (release.ROOT / "CHANGELOG.md").read_text()
    assert text.partition("\n## ")[2].startswith(f"{release.__version__} (")
