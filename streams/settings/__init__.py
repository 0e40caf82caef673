"""All settings, in groups: `Settings`, and the functions that read them. See `loading`."""

from perennial.streams.settings.groups import SettingsError
from perennial.streams.settings.loading import (
    Settings,
    all_fields,
    code_version,
    load_settings,
    variable_of,
)

__all__ = ["Settings", "SettingsError", "all_fields", "code_version", "load_settings", "variable_of"]
