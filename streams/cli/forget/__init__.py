"""The commands `perennial forget`, `forget status`, `forget hold` and `forget release`.

app: options and help texts. selection: options to a selector, and a selector to words. plan: `--dry-run`.
requests: send a request and follow it. status: read retention-status and show it.
"""
