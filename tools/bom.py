"""What the image that this runs in is made of, as CycloneDX JSON: Python's and Debian's packages.

`make sbom-image` pipes it into the image's own Python, so it needs the standard library alone.
"""

import json
import platform
import re
import sys
import uuid
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import quote

DPKG = Path("/var/lib/dpkg/status")


def python_packages() -> list[dict[str, object]]:
    """Of the environment that the server runs in."""
    found = {}
    for one in distributions():
        name = re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower()
        purl = f"pkg:pypi/{name}@{quote(one.version, safe='')}"
        found[name] = component(name, one.version, purl, one.metadata.get("License-Expression"))
    return [found[name] for name in sorted(found)]


def system_packages(status: str, system: dict[str, str]) -> list[dict[str, object]]:
    """Of Debian and its kin.

    Args:
        status: dpkg's database.
        system: fields of os-release.
    """
    found = []
    for paragraph in status.split("\n\n"):
        fields = dict(re.findall(r"^([A-Z][\w-]*): (.*)$", paragraph, re.MULTILINE))
        if not fields.get("Status", "").endswith(" installed"):
            continue
        name, version = fields["Package"], fields["Version"]
        where = f"arch={fields['Architecture']}&distro={system['ID']}-{system['VERSION_ID']}"
        purl = f"pkg:deb/{system['ID']}/{quote(name)}@{quote(version, safe='')}?{where}"
        found.append(component(name, version, purl))
    return found


def component(
    name: str, version: str, purl: str, expression: str | None = None
) -> dict[str, object]:
    """A package as CycloneDX has it; `expression` is its licence in SPDX."""
    one: dict[str, object] = {"type": "library", "bom-ref": purl}
    one |= {"name": name, "version": version, "purl": purl}
    return one | ({"licenses": [{"expression": expression}]} if expression else {})


def bill(image: str) -> dict[str, object]:
    """The bill of materials of the image of that name."""
    name, _, tag = image.rpartition(":")
    subject = {"type": "container", "name": name or image, "version": tag if name else ""}
    system = platform.freedesktop_os_release()
    packages = python_packages()
    if DPKG.exists():
        packages += system_packages(DPKG.read_text(), system)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "component": subject,
        },
        "components": packages,
    }


if __name__ == "__main__":
    json.dump(bill(sys.argv[1]), sys.stdout, indent=1)
