"""The retain role: carry retention requests from acceptance to their end.

agent: takes deliveries from Faust. service: performs the work and keeps the clock. request_worker: the work on requests,
in slices (work_slice). adapter_calendar: when to look at which adapter. ledger: the stored form of a request. request_store: its
objects. request_cache: those that can still change. store_facts, example_index: what the store knows of an adapter.
ledger_migration: the ledger of an earlier release. rules/: all decisions, pure.
"""
