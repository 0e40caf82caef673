"""The texts on which a learner and a serving engine are compared: the same version must predict the same next tokens.

A learner records what a new version predicts after each text (`Manifest.probes`). A backend asks the engine for the same
before it serves the version. The long text has more than 128 tokens under every tokenizer: on Hopper GPUs, vLLM's LoRA
kernel computes NaN from about that token on (vLLM issue 48590).
"""

from __future__ import annotations

PROBE_TEXTS = {
    "sentence-1": "The parcel was sent on Monday, and the customer asked for",
    "question-1": "Question: How long does a refund take?\nAnswer:",
    "passage-1": (
        "The shop opens at nine in the morning and closes at six in the evening. On the first day of the month all "
        "prices are checked, and what has changed is written on the list at the door. A customer who wants to return "
        "something brings it back with the bill. The money is paid out at once if the bill is not older than two weeks; "
        "after that time there is a voucher. Large orders are sent by train and small ones by post. If a parcel is lost, "
        "the sender looks for it for five days and then sends another one. Questions are answered by letter, by phone, "
        "or at the desk in the hall. Nobody has to wait longer than one day for an answer. In winter the hall is heated "
        "from seven on, and in summer the doors stay open. The most important rule of the house is that every customer"
    ),
}
"""Texts by name. A text never changes under its name, because stored manifests name it."""
