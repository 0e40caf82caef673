"""Publish a document and a corrected answer, and wait until the broker has stored both.

    PERENNIAL_KAFKA=127.0.0.1:9092 python examples/publisher.py acme/support

Needs the plain install: pip install perennial-lm
"""

from __future__ import annotations

import sys

from perennial import Publisher, PublishError


def main(adapter: str) -> int:
    """Publish two events and print where the broker stored them."""
    try:
        # The broker's address is PERENNIAL_KAFKA; give it as Publisher("host:9092") to set it in code.
        with Publisher() as publisher:
            document = publisher.document(
                adapter=adapter,  # the adapter that is to learn it: 1 to 4 segments, tenant first
                document_id="faq-7",  # your id; publishing the same content twice is harmless
                text="Refunds take two days since March.",
                subjects=["customer-4711"],  # whom it is about, so that all of it can be erased by one request
                retention_class="P90D",  # forget it after 90 days; leave it out to keep it until somebody asks
            )
            corrected = publisher.interaction(
                adapter=adapter,
                interaction_id="ticket-17",
                prompt="How long does a refund take?",
                response="Thirty days.",
                correction="Two days.",  # the answer that the adapter learns
            )
            # Sending is asynchronous; wait for the receipts only where you need to know.
            for receipt in (document, corrected):
                delivery = receipt.result(timeout_s=30)
                print(f"{receipt.event_id}: {delivery.topic}, partition {delivery.partition}, offset {delivery.offset}")
    except PublishError as error:  # an event is not valid, no broker answers, or an event was not delivered
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
