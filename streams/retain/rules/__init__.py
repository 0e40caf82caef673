"""The rules of retention requests, all pure: what a step does about a request, what falls due, what holds and policies say.

state_machine: a request in one adapter. transitions: its tables. calendar: the requests that retain makes by itself.
in_force: holds and policies by adapter. replica_report: which replicas confirmed a change.
"""
