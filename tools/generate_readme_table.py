"""Write the configuration tables of the README from the settings: `python -m tools.generate_readme_table`."""

from __future__ import annotations

from pathlib import Path

from pydantic import AliasChoices
from pydantic.fields import FieldInfo

from perennial.storage.objects.s3_settings import S3Settings
from perennial.streams.settings import all_fields

README = Path(__file__).resolve().parents[1] / "README.md"
_HEAD = "| variable | default | what it is for |\n|---|---|---|\n"


def settings_table() -> str:
    """Return all settings but those of S3 as a Markdown table."""
    rows = [
        f"| `{variable}` | {_default(variable, field)} | {field.description} |\n" for _, variable, field in all_fields()
    ]
    return _HEAD + "".join(rows)


def s3_table() -> str:
    """Return the settings of the S3 store as a Markdown table, with the variables that stand in for each."""
    rows = []
    for field in S3Settings.model_fields.values():
        alias = field.validation_alias
        names = [str(name) for name in alias.choices] if isinstance(alias, AliasChoices) else []
        stand_ins = ", ".join(f"`{name}`" for name in names[1:])
        default = f"`{field.default}`" if isinstance(field.default, str) and field.default else ""
        rows.append(f"| `{names[0]}` | {', '.join(filter(None, (stand_ins, default)))} | {field.description} |\n")
    return _HEAD + "".join(rows)


def _default(variable: str, field: FieldInfo) -> str:
    if variable == "PERENNIAL_DATA_DIR":
        return "`~/.local/share/perennial`"
    return f"`{field.default!r}`" if field.default != "" else ""


TABLES = {"settings": settings_table, "s3-settings": s3_table}


def write(readme: Path = README) -> bool:
    """Put the tables into the README between their marks. Return whether it differed."""
    text = fresh = readme.read_text("utf-8")
    for mark, table in TABLES.items():
        before, _, rest = fresh.partition(f"<!-- {mark} -->\n")
        _, end, after = rest.partition(f"<!-- /{mark} -->")
        fresh = f"{before}<!-- {mark} -->\n{table()}{end}{after}"
    if fresh != text:
        readme.write_text(fresh, "utf-8")
    return fresh != text


if __name__ == "__main__":
    write()
