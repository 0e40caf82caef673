"""Carry out forget jobs: find examples, plan, rebuild updates without them, delete what is unreferenced."""
