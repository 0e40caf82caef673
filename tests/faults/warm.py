"""What the server that roles are forked from has imported and read before; nothing here starts a thread."""

import learner.scorer
import learner.worker
import streams.agents
import streams.intake
from learner.base import general_texts

general_texts("train")

__all__ = ["learner", "streams"]
