"""Keep a folder filled with the live version of an adapter, for an inference server that loads PEFT adapters.

    PERENNIAL_KAFKA=127.0.0.1:9092 PERENNIAL_STORE=/srv/perennial \
        python examples/subscriber_folder.py acme/support /srv/adapters

The file /srv/adapters/acme/support/@live.json names the folder that the server should load; it changes in one step.
Ends on Ctrl-C or SIGTERM. Needs the plain install: pip install perennial-lm
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

from perennial import DirectoryBackend, PerennialError, Subscriber


def announce(state: Any, stage_s: Mapping[str, float]) -> None:
    """Print what is served now; a good place to tell your server to load it."""
    print(
        f"generation {state.generation}: {state.version}, {stage_s['publish_to_served']:.1f} s after it was published",
        flush=True,
    )


def main(adapter: str, folder: str) -> int:
    """Follow the adapter until a signal comes."""
    stop = threading.Event()
    # A thread waits for the signals. A handler that sets the event could wait for ever for the event's own lock.
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=lambda: (signal.sigwait(signals), stop.set()), daemon=True).start()
    try:
        # A version stays on the disk for half a minute after another one went live: servers may still read it.
        backend = DirectoryBackend(folder, grace_s=30)
        Subscriber(adapter, backend, on_activate=announce).run(stop)
    except PerennialError as error:  # for example: PERENNIAL_STORE is not set
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
