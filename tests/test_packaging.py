"""What pyproject.toml, the workflows and the installation page state together."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import retinanet as rn

_ROOT = Path(__file__).resolve().parents[1]
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text("utf-8"))["project"]
_EXTRAS = _PROJECT["optional-dependencies"]


def test_version_is_stated_once() -> None:
    assert "version" in _PROJECT["dynamic"]
    assert metadata.version("retinanet") == rn.__version__


def test_ci_runs_on_every_python_and_platform_of_the_classifiers() -> None:
    workflow = yaml.safe_load((_ROOT / ".github/workflows/test.yml").read_text("utf-8"))
    matrix = workflow["jobs"]["core"]["strategy"]["matrix"]
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(_PROJECT["classifiers"]))
    assert matrix["python"] == versions
    assert _PROJECT["requires-python"] == f">={versions[0]}"
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}


def test_every_extra_named_by_an_error_exists() -> None:
    named = set()
    for path in (_ROOT / "src").rglob("*.py"):
        text = path.read_text("utf-8")
        named.update(re.findall(r'MissingExtraError\([^()]+(?:\([^()]*\))?, "(\w+)"\)', text))
        named.update(re.findall(r'import_extra\([^()]+, "(\w+)"\)', text))
    assert {"hub", "onnx", "openvino", "ray", "serve", "timm", "video"} <= named
    assert named <= set(_EXTRAS)


@pytest.mark.parametrize("extra", sorted(_EXTRAS))
def test_installation_page_lists_every_extra(extra: str) -> None:
    page = (_ROOT / "docs" / "installation.md").read_text("utf-8")
    assert re.search(rf"^\|[^|]*`{extra}`", page, re.M)


def test_no_package_is_listed_twice_by_the_extras_of_all() -> None:
    def packages(extra: str) -> list[str]:
        found = []
        for requirement in _EXTRAS[extra]:
            if inner := re.fullmatch(r"retinanet\[(.+)\]", requirement):
                found += [name for part in inner[1].split(",") for name in packages(part)]
            else:
                found.append(re.split(r"[<>=;\[]", requirement)[0])
        return found

    found = packages("all")
    assert len(found) == len(set(found))
