"""`perennial replicas`: list the subscribers that were heard of, and delete the record of one that ended."""
