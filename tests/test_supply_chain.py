"""What headrace is made of is written down truly: the lock, the bill of materials, the page about dependencies."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "supply_chain" / "requirements.txt").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = ("serve", "grammar")
# Of everything that a user gets with core, [serve] and [grammar]; one more needs a look first.
PERMITTED = {
    "Apache-2.0",
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "PSF-2.0",
    "0BSD",
    "Zlib",
    "CC0-1.0",
    "MPL-2.0",
}


@pytest.fixture(scope="module")
def sbom() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sbom", ROOT / "supply_chain" / "sbom.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bill(sbom: ModuleType) -> dict[str, Any]:
    made: dict[str, Any] = sbom.bill(sbom.installed("headrace", EXTRAS), EXTRAS, LOCK)
    return made


def _direct(*extras: str) -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    return found + [Requirement(text) for extra in extras for text in optional[extra]]


def test_the_lock_has_everything_by_version_and_hash(sbom: ModuleType) -> None:
    pinned: dict[str, list[str]] = {}
    for (name, version), digests in sbom.hashes(LOCK).items():
        assert digests, f"{name} has no hash"
        pinned.setdefault(name, []).append(version)
    build = (ROOT / "supply_chain" / "build.in").read_text(encoding="utf-8")
    asked = [Requirement(line) for line in build.splitlines() if line and not line.startswith("#")]
    asked += _direct("dev", "serve", "grammar", "plots", "qnn")
    for need in asked:
        if need.name != "headrace":
            versions = pinned.get(canonicalize_name(need.name), [])
            assert any(need.specifier.contains(version) for version in versions), f"{need}: sh supply_chain/lock.sh"
    lines = [line for line in LOCK.splitlines() if line and not line.startswith(" ")]
    assert all("==" in line for line in lines) and "://" not in LOCK and "--index" not in LOCK


def test_the_bill_is_whole_and_hangs_together(sbom: ModuleType, bill: dict[str, Any]) -> None:
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bill["serialNumber"])
    own = bill["metadata"]["component"]
    refs = [own["bom-ref"], *(one["bom-ref"] for one in bill["components"])]
    assert len(set(refs)) == len(refs) and all(one["purl"] == one["bom-ref"] for one in bill["components"])
    below = {one["ref"]: one["dependsOn"] for one in bill["dependencies"]}
    assert set(below) == set(refs) and all(ref in below for refs in below.values() for ref in refs)
    reached, waiting = set(), [own["bom-ref"]]
    while waiting:
        ref = waiting.pop()
        if ref not in reached:
            reached.add(ref)
            waiting += below[ref]
    assert reached == set(refs)
    names = {canonicalize_name(one["name"]) for one in bill["components"]}
    assert {canonicalize_name(need.name) for need in _direct(*EXTRAS)} <= names
    assert bill == sbom.bill(sbom.installed("headrace", EXTRAS), EXTRAS, LOCK)


def _said(component: dict[str, Any]) -> str:
    (told,) = component["licenses"]
    return str(told.get("expression") or told["license"].get("id") or f"? {told['license']['name']}")


def test_everything_has_a_licence_that_was_looked_at(bill: dict[str, Any]) -> None:
    for component in bill["components"]:
        assert set(re.split(r" (?:AND|OR|WITH) ", _said(component))) <= PERMITTED, component["name"]
    weak = [one["name"] for one in bill["components"] if "MPL" in _said(one)]
    assert weak == ["tqdm"], "docs/dependencies.md names it"


def test_the_page_tells_every_dependency_and_its_licence(sbom: ModuleType) -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    told = {canonicalize_name(row[0]): row[1] for row in rows[1:] if not row[0].startswith("**")}
    extras = [extra for extra in PROJECT["optional-dependencies"] if extra not in ("dev", "reference")]
    assert set(told) == {canonicalize_name(need.name) for need in _direct(*extras)}
    assert {row[0].strip("*[]") for row in rows if row[0].startswith("**[")} == set(extras)
    for name, component in ((n, one) for n, one in told.items() if n in sbom.installed("headrace", extras)):
        assert component == _said({"licenses": [sbom.licence(sbom.distribution(name))]}), name
