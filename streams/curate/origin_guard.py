"""Keep implausible origins and wrong high-water marks from being taken for right ones.

Kafka and the store may come and go meanwhile: the check waits for them, as everything else does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, TypeVar

from perennial.storage.errors import StoreUnavailableError
from perennial.streams.curate.batcher import MicroBatcher
from perennial.streams.events.models import Origin
from perennial.streams.kafka.origin_check import OriginCheck
from perennial.streams.kafka.security.access_errors import KafkaUnavailableError
from perennial.streams.observe.metrics import Metrics

log = logging.getLogger("perennial.curate")

KAFKA_RETRY_S: Final = 1.0
T = TypeVar("T")


class OriginGuard:
    """Asks an OriginCheck on a thread, again and again while Kafka or the store does not answer.

    Args:
        check: refuses what the broker cannot have given; None: nothing is checked, for tests without a broker.
        metrics: counts wrong marks.
    """

    def __init__(self, check: OriginCheck | None, metrics: Metrics) -> None:
        self._check = check
        self._metrics = metrics

    async def require(self, origin: Origin) -> None:
        """Return where the broker can have given this origin.

        Raises:
            WireError: the broker cannot have given it; the reason is `implausible-origin`.
        """
        check = self._check
        if check is None or check.is_known(origin):
            return
        error = await _until_answered(lambda: check.error(origin))
        if error is not None:
            raise error

    async def distrust_wrong_marks(self, batcher: MicroBatcher[Any]) -> None:
        """Report marks beyond the end of their log, and let the batcher drop nothing because of them.

        What such a mark covers and what has no recent id is then refused as out of order, instead of acknowledged as a
        redelivery in silence.
        """
        if self._check is None:
            return
        wrong = 0
        for partition, position in batcher.history.high_water_marks:
            problem = await _until_answered(self._question(partition, position))
            if problem is not None:
                wrong += 1
                batcher.distrust(partition)
                log.error(
                    "a high-water mark of %s is wrong: %s; what it covers is refused. Remedy: `perennial marks show %s`, "
                    "then `perennial marks repair %s --partition %s --to-log-end`",
                    batcher.adapter, problem, batcher.adapter, batcher.adapter, partition,
                )  # fmt: skip
        self._metrics.wrong_marks(batcher.adapter, wrong)

    def _question(self, partition: str, position: tuple[int, int]) -> Callable[[], str | None]:
        check = self._check
        return lambda: check.mark_problem(partition, position) if check else None


async def _until_answered(question: Callable[[], T]) -> T:
    while True:
        try:
            return await asyncio.to_thread(question)
        except (KafkaUnavailableError, StoreUnavailableError) as unavailable:
            log.warning("an origin cannot be checked yet: %s", unavailable)
            await asyncio.sleep(KAFKA_RETRY_S)
