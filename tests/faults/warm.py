"""Everything that the fork server imports and reads before it forks roles; nothing here may start a thread."""

from perennial.learner.model.general_text import general_texts
from perennial.learner.roles import learner, scorer
from perennial.streams import faust_app
from perennial.streams.intake import service

general_texts("train")

__all__ = ["faust_app", "learner", "scorer", "service"]
