"""The name of the person at this machine, for records of who asked for what."""

from __future__ import annotations

import getpass


def user_name() -> str:
    """Return the user's name; `command line` where the user has none, as in a container under a number."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "command line"
