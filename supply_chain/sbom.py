"""A bill of materials of what is installed here: headrace and everything it needs, with versions and licences.

    python supply_chain/sbom.py [EXTRA …] > sbom.json

CycloneDX 1.6 JSON (https://cyclonedx.org/docs/1.6/json). The same environment gives the same file: it holds no time and
no machine. Where requirements.txt has the installed version, its hashes are told too.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "headrace"
LOCK = Path(__file__).parent / "requirements.txt"
_CLASSIFIER = re.compile(r"License :: (?:OSI Approved :: )?(.+)")
# What classifiers and free texts say, as SPDX spells it. Those that say BSD alone are of three clauses, all of them.
_SAID = {
    "Apache-2.0": ("apache software license", "apache license 2.0", "apache 2.0", "apache license, version 2.0"),
    "MIT": ("mit license",),
    "BSD-3-Clause": ("bsd license", "bsd", "3-clause bsd license"),
    "ISC": ("isc license (iscl)",),
    "MPL-2.0": ("mozilla public license 2.0 (mpl 2.0)",),
    "PSF-2.0": ("python software foundation license", "psf"),
}
SPDX = {text: name for name, texts in _SAID.items() for text in (name.lower(), *texts)}
_EXPRESSION = re.compile(r"[A-Za-z0-9.+-]+(?: (?:AND|OR|WITH) [A-Za-z0-9.+-]+)+")


def installed(root: str, extras: Sequence[str] = ()) -> dict[str, Distribution]:
    """A distribution and everything that it needs in this environment, by canonical name; what is not installed, such
    as another platform's, is left out."""
    found: dict[str, Distribution] = {}
    waiting = [(root, tuple(extras))]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while waiting:
        asked = waiting.pop()
        if asked in seen:
            continue
        seen.add(asked)
        name, wanted = asked
        try:
            found[canonicalize_name(name)] = here = distribution(name)
        except PackageNotFoundError:
            continue
        waiting += [(need.name, tuple(sorted(need.extras))) for need in needs(here, wanted)]
    return found


def needs(dist: Distribution, extras: Sequence[str] = ()) -> Iterator[Requirement]:
    """What a distribution requires in this environment."""
    for text in dist.requires or ():
        need = Requirement(text)
        if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield need


def licence(dist: Distribution) -> dict[str, Any]:
    """A distribution's licence as CycloneDX has it: an SPDX expression where one is known, else a name."""
    told = dist.metadata
    if expression := told.get("License-Expression"):
        return {"expression": expression}
    classified = [match[1] for text in told.get_all("Classifier") or () if (match := _CLASSIFIER.match(text))]
    free = (told.get("License") or "").strip().partition("\n")[0]
    for name in (*classified, free):
        if name.lower() in SPDX:
            return {"license": {"id": SPDX[name.lower()]}}
    if _EXPRESSION.fullmatch(free):
        return {"expression": free}
    name = classified[0] if classified else free
    return {"license": {"name": name or "not stated"}}


def hashes(lock: str) -> dict[tuple[str, str], list[str]]:
    """(name, version) → sha256 of its files, from a lock file."""
    pinned: dict[tuple[str, str], list[str]] = {}
    for block in re.split(r"\n(?=\S)", lock):
        if match := re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;\\]+)", block):
            pinned[canonicalize_name(match[1]), match[2]] = re.findall(r"sha256:([0-9a-f]{64})", block)
    return pinned


def bill(found: Mapping[str, Distribution], extras: Sequence[str], lock: str) -> dict[str, Any]:
    """The bill of materials.

    Args:
        found: what `installed` gives; it holds `ROOT`.
        extras: of `ROOT`, that were asked for.
        lock: the text of a lock file, for hashes.
    """
    pinned = hashes(lock)
    purls = {name: f"pkg:pypi/{name}@{dist.version}" for name, dist in found.items()}
    components, dependencies = {}, []
    for name, dist in sorted(found.items()):
        component: dict[str, Any] = {
            "type": "application" if name == ROOT else "library",
            "bom-ref": purls[name],
            "name": dist.metadata["Name"],
            "version": dist.version,
            "purl": purls[name],
            "licenses": [licence(dist)],
        }
        files = pinned.get((name, dist.version), ())
        if len(files) == 1:
            component["hashes"] = [{"alg": "SHA-256", "content": files[0]}]
        elif files:  # one for each platform: any of them is what was installed
            component["properties"] = [{"name": "headrace:lock:sha256", "value": digest} for digest in files]
        components[name] = component
        below = {canonicalize_name(need.name) for need in needs(dist, extras if name == ROOT else ())}
        dependencies.append({"ref": purls[name], "dependsOn": sorted(purls[one] for one in below if one in purls)})
    own = components.pop(ROOT)
    body = {"components": list(components.values()), "dependencies": dependencies}
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([own, body], sort_keys=True))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"component": own},
        **body,
    }


if __name__ == "__main__":
    asked = sys.argv[1:]
    made = bill(installed(ROOT, asked), asked, LOCK.read_text(encoding="utf-8"))
    json.dump(made, sys.stdout, indent=1)
    sys.stdout.write("\n")
