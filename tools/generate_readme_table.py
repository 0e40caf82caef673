"""Write the README's tables of settings and of retention kinds: `python -m tools.generate_readme_table`.

A table stands between `<!-- name -->` and `<!-- /name -->`, the name being a key of TABLES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import AliasChoices
from pydantic.fields import FieldInfo

from perennial.storage.objects.s3_settings import S3Settings
from perennial.streams.retention.kinds import KINDS
from perennial.streams.settings import all_fields
from perennial.streams.settings.groups import ENV_PREFIX
from perennial.streams.settings.presets import preset_settings

README = Path(__file__).resolve().parents[1] / "README.md"
_HEAD = "| variable | default | what it is for |\n|---|---|---|\n"


def settings_table() -> str:
    """Return all settings but those of S3 as a Markdown table."""
    rows = [
        f"| `{variable}` | {_default(variable, field)} | {field.description} |\n" for _, variable, field in all_fields()
    ]
    return _HEAD + "".join(rows)


def s3_table() -> str:
    """Return the settings of the S3 store as a Markdown table, with the variables that are read if one is not set."""
    rows = []
    for field in S3Settings.model_fields.values():
        alias = field.validation_alias
        names = [str(name) for name in alias.choices] if isinstance(alias, AliasChoices) else []
        fallbacks = ", ".join(f"`{name}`" for name in names[1:])
        default = f"`{field.default}`" if isinstance(field.default, str) and field.default else ""
        rows.append(f"| `{names[0]}` | {', '.join(filter(None, (fallbacks, default)))} | {field.description} |\n")
    return _HEAD + "".join(rows)


def _default(variable: str, field: FieldInfo) -> str:
    if variable == "PERENNIAL_DATA_DIR":
        return "`~/.local/share/perennial`"
    by_size = ", or by the base's size" if variable.removeprefix(ENV_PREFIX).lower() in preset_settings() else ""
    return f"`{field.default!r}`{by_size}" if field.default not in {"", None} else ""


def kinds_table() -> str:
    """Return the kinds of retention requests that are accepted as a Markdown table."""
    selectors = {"required": "a selector", "retention_class": "a selector with retention_class",
                 "optional": "a selector, or none for everything", "refused": ""}  # fmt: skip
    rows = []
    for kind in KINDS.values():
        if not kind.refused_because:
            needs = ", ".join(filter(None, (selectors[kind.selector], *kind.requires)))
            rows.append(f"| `{kind.kind}` | {kind.summary} | {needs} |\n")
    return "| kind | what it does | needs |\n|---|---|---|\n" + "".join(rows)


TABLES = {"settings": settings_table, "s3-settings": s3_table, "retention-kinds": kinds_table}


def write(document: Path = README, tables: Mapping[str, Callable[[], str]] = TABLES) -> bool:
    """Write the tables into a document, the README by default. Return True if that changed it."""
    text = fresh = document.read_text("utf-8")
    for name, table in tables.items():
        before, _, rest = fresh.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        fresh = f"{before}<!-- {name} -->\n{table()}{end}{after}"
    if fresh != text:
        document.write_text(fresh, "utf-8")
    return fresh != text


if __name__ == "__main__":
    write()
