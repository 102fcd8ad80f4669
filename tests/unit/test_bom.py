"""The bill of materials that an image writes of itself."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tools import bom

ROOT = Path(__file__).parents[2]
STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u14
Description: GNU C Library
 Version: not this one

Package: removed
Status: deinstall ok config-files
Architecture: all
Version: 1:2~rc1

Package: epoch
Status: install ok installed
Architecture: all
Version: 1:2~rc1
"""


@pytest.mark.skipif(not bom.DPKG.exists(), reason="needs Debian or its kin")
def test_it_names_python_and_system_packages_and_is_valid_by_cyclonedxs_schema():
    ran = subprocess.run(
        [sys.executable, "-", "registry:5000/x:1.2"],
        input=(ROOT / "tools/bom.py").read_text(),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(ran.stdout) is None
    told = json.loads(ran.stdout)
    subject = told["metadata"]["component"]
    assert (subject["name"], subject["version"]) == ("registry:5000/x", "1.2")
    purls = {one["purl"] for one in told["components"]}
    assert len(purls) == len(told["components"])
    assert f"pkg:pypi/torch@{version('torch')}" in purls
    assert any(purl.startswith("pkg:deb/") and "/libc6@" in purl for purl in purls)


def test_system_packages_are_those_that_are_installed():
    found = bom.system_packages(STATUS, {"ID": "debian", "VERSION_ID": "12"})
    assert [one["purl"] for one in found] == [
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u14?arch=amd64&distro=debian-12",
        "pkg:deb/debian/epoch@1%3A2~rc1?arch=all&distro=debian-12",
    ]
