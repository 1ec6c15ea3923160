"""Write docs/settings.md, the table of all settings, from retinanet.config and the recipes.

    python benchmarks/settings_page.py

A setting's meaning is the comment on its line in config.py.
"""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from retinanet import config
from retinanet.files import write_atomic

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
_INTRODUCTION = """# Settings

Written by `python benchmarks/settings_page.py` from `retinanet/config.py`: change a setting there.

Every setting is `section.name=value` after the data of `retinanet train`, a line of a recipe, or an
item of `settings` in `rn.train`: [Training](training.md#settings). Defaults are the paper's (Lin et
al. 2017, "Sec.") or, where it is silent, those of Detectron, with which its authors trained.
"Elsewhere" are names of the setting in torchvision, detectron2, mmdetection and Ultralytics, for
which `retinanet train` suggests the setting. "Recipes" are those that change it.
"""
_BOUNDS = {"ge": "≥ ", "gt": "> ", "le": "≤ ", "lt": "< "}


def meanings(section: type[BaseModel]) -> dict[str, str]:
    """Return the comment of each field: on its lines or else directly above."""
    source = inspect.getsource(section)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found, previous_end = {}, 0
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            end = node.end_lineno or node.lineno
            on_line = [comments[line] for line in range(node.lineno, end + 1) if line in comments]
            above = [comments[n] for n in range(previous_end + 1, node.lineno) if n in comments]
            found[node.target.id] = " ".join(on_line or above)
        previous_end = node.end_lineno or node.lineno
    return found


def allowed(kind: Any, field: FieldInfo) -> str:
    """Describe the values of a setting: its type, choices and bounds."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    bounds = ", ".join(
        f"{sign}{_number(getattr(limit, name))}"
        for limit in field.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(limit, name)
    )
    return ", or ".join(_kind(part, bounds) for part in kinds)


def _kind(kind: Any, bounds: str) -> str:
    if kind is NoneType:
        return "`none`"
    if kind is bool:
        return "`true`, `false`"
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is tuple:
        items = [item for item in get_args(kind) if item is not Ellipsis]
        count = "" if Ellipsis in get_args(kind) else f"{len(items)} "
        item = _kind(items[0], "")
        return f"list of {count}{item}{'s' if items[0] in (int, float, str) else ''}"
    if get_origin(kind) is dict:
        return "table of numbers ≥ 0, < 1 by name"
    name = {int: "integer", float: "number", str: "name"}.get(kind, str(kind))
    return f"{name} {bounds}" if bounds and kind is not str else name


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    return _number(value)


def changes() -> dict[str, list[str]]:
    """Return, for each setting, the recipes that change it, with their values."""
    found: dict[str, list[str]] = {}
    for recipe in config.recipe_names():
        text = (resources.files("retinanet") / "recipes" / f"{recipe}.toml").read_text("utf-8")
        for section, values in tomllib.loads(text).items():
            if isinstance(values, dict):
                for name, value in values.items():
                    found.setdefault(f"{section}.{name}", []).append(f"{recipe} `{_value(value)}`")
    return found


def page() -> str:
    """Format the page."""
    return _INTRODUCTION + "".join(_section_lines())


def _section_lines() -> Iterator[str]:
    recipes, others = changes(), config._OTHER_NAMES
    for section, info in config.Recipe.model_fields.items():
        kind = info.annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            continue
        yield f"\n## {section}\n\n{(kind.__doc__ or '').splitlines()[0]}\n\n"
        yield "| setting | default | values | meaning | elsewhere | recipes |\n"
        yield "|---|---|---|---|---|---|\n"
        comments = meanings(kind)
        for name, field in kind.model_fields.items():
            key = f"{section}.{name}"
            cells = (
                f"`{key}`",
                f"`{_value(field.default)}`",
                allowed(field.annotation, field),
                comments.get(name, "").replace("|", "\\|"),
                ", ".join(f"`{other}`" for other in others.get(key, ())),
                ", ".join(recipes.get(key, ())),
            )
            yield f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    write_atomic(PAGE, page())
