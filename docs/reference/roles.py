"""Griffe extension: Sphinx roles as links, and defaults that settings give as values."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Function, Object

from retinanet import config

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(~?)([\w.]+)`")
_MATH = re.compile(r"^\.\. math:: *(.+)$", re.M)


class Roles(Extension):
    """Rewrite docstrings and signatures when they are found."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Turn ``:func:`~package.name``` into a link if there is a target, formulas into code."""
        if obj.docstring:
            linked = _ROLE.sub(_link, obj.docstring.value)
            obj.docstring.value = _MATH.sub(r"    \1", linked)

    def on_function_instance(self, *, func: Function, **_: Any) -> None:
        """Replace a default such as ``LossConfig().gamma`` by its value in retinanet.config."""
        for parameter in func.parameters:
            home, _, setting = str(parameter.default).rpartition(".")
            if home == "_DEFAULTS":
                home = str(func.module[home].value)
            if section := getattr(config, home.removesuffix("()"), None):
                parameter.default = repr(getattr(section(), setting))


def _link(role: re.Match[str]) -> str:
    short, name = role.groups()
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{name}"><code>{shown}</code></autoref>'
