"""Run forget jobs: find examples, plan, rebuild updates without them, delete what no version needs."""
