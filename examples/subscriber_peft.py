"""Answer prompts with a model of this process whose adapter follows the live version without a restart.

    PERENNIAL_KAFKA=127.0.0.1:9092 PERENNIAL_STORE=/srv/perennial python examples/subscriber_peft.py acme/support

Reads one prompt a line from standard input and prints the answer. Needs the extra `worker`:
pip install 'perennial-lm[worker]'
"""

from __future__ import annotations

import sys

from perennial import LoraConfig, PeftBackend, PerennialError, Subscriber, load_base, load_settings


def main(adapter: str) -> int:
    """Answer until standard input ends."""
    try:
        # The learner that made the versions has the same settings: PERENNIAL_BASE, PERENNIAL_RANK, PERENNIAL_ALPHA.
        settings = load_settings()
        base = load_base(settings.model.base, settings.model.device)
        backend = PeftBackend(base, LoraConfig(settings.training.rank, settings.training.alpha))
        with Subscriber(adapter, backend, settings=settings) as subscriber:
            # The frozen base answers until a version is live; wait for one if that is not what you want.
            if not subscriber.wait_for(generation=1, timeout_s=10):
                print("no version is live yet: the base answers", file=sys.stderr)
            for line in sys.stdin:
                # All that a lease encloses uses one version, even if another one goes live meanwhile.
                with backend.lease() as version:
                    answer = backend.generate(line.strip(), max_new_tokens=24)
                print(f"[{version or 'base'}] {answer}", flush=True)
    except PerennialError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
