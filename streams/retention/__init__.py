"""The meaning of retention requests for an example; shared by curate, retain, redrive and the learner.

kinds: the table of retention kinds. quarantine_filter: whether an example may be learned.
"""
