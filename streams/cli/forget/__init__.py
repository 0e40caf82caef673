"""The commands `perennial forget`, `forget status`, `forget approve`, `forget hold`, `forget release` and `forget unsuppress`.

commands: options and help texts. selection: options to a selector, and a selector to words. preview: `--dry-run`.
requests: send a request and follow it. request_status: read retention-status and show it. outcome: what a request did in
each adapter. approval: `approve`. unsuppression: `unsuppress`.
"""
