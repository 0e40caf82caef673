# ruff: noqa: INP001  # a script of the image, in no package
"""Whether the role in this container is ready: exit 0 where its /healthz is green and no longer "starting".

Standard library only and started with -I -S, so that a check every few seconds costs no more than an interpreter.
"""

import http.client
import json
import os
import sys

TIMEOUT_S = 2.0
LOOPBACK_OF = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # read, not bound
"""Addresses that stand for every interface, and the one to ask; http.client uses no proxy."""


def main() -> int:
    """0: ready; 1: it answers and is not; 2: it does not answer."""
    try:
        host = os.environ.get("PERENNIAL_METRICS_HOST", "").strip().removeprefix("[").removesuffix("]")
        connection = http.client.HTTPConnection(
            LOOPBACK_OF.get(host, host), int(os.environ["PERENNIAL_METRICS_PORT"]), timeout=TIMEOUT_S
        )
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        body = answer.read(65536).decode()
        ready = answer.status == http.HTTPStatus.OK and json.loads(body)["status"] == "ok"
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        print(f"no usable answer: {error!r}")
        return 2
    print(body)
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main())
