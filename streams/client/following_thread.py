"""Follow an alias in a thread of its own, and end the thread."""

from __future__ import annotations

import logging
import threading
from typing import Self

from perennial.storage.errors import PerennialError

_log = logging.getLogger("perennial.subscriber")


class SubscriberError(PerennialError):
    """A subscriber cannot do what is asked of it."""


class FollowingThread:
    """Starts `run` in a thread, and ends it.

    A subclass has `run`, which returns when `_stop` is set, and sets `_looked` after each look at the alias.

    Args:
        adapter: Name of the adapter that is followed.
    """

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self._stop = threading.Event()
        self._looked = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def run(self, stop: threading.Event | None = None) -> None:
        """Follow the alias in this thread.

        Args:
            stop: Ends the call when it is set. None: `close` ends the call.
        """
        raise NotImplementedError

    def start(self) -> Self:
        """Follow the alias in a new thread until `close`.

        Raises:
            SubscriberError: The subscriber was started before.
        """
        if self._thread is not None:
            raise SubscriberError("the subscriber was started before", remedy="make a new one")
        self._thread = threading.Thread(target=self._run_in_thread, name=f"subscriber {self.adapter}", daemon=True)
        self._thread.start()
        return self

    def _run_in_thread(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self._error = error
            _log.exception("the subscriber of %s ended", self.adapter)
            raise

    def close(self, timeout_s: float = 60.0) -> None:
        """Stop following the alias and announce that the replica leaves, so that no request waits for it any more.

        The backend goes on serving the version that it has: end its service, or start another subscriber soon, where a
        version that is revoked later must not be served.

        Args:
            timeout_s: Longest wait for the thread to end, in seconds.

        Raises:
            SubscriberError: An error had ended the thread, or the thread did not end in time.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive() or self._error is not None:
                raise SubscriberError(
                    f"the subscriber of {self.adapter} did not end well",
                    got=repr(self._error) if self._error else f"still busy after {timeout_s:g} s",
                    remedy="see its log",
                ) from self._error

    def has_looked(self, timeout_s: float) -> bool:
        """Wait until the alias was looked at once since the start, whatever came of it.

        Args:
            timeout_s: Longest wait in seconds.

        Returns:
            False if it was not looked at in time.
        """
        return self._looked.wait(timeout_s)

    @property
    def alive(self) -> bool:
        """True while the thread that `start` made follows the alias."""
        return self._thread is not None and self._thread.is_alive()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
