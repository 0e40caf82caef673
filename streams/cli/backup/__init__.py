"""`perennial backup`: copy the store, list and check the copies, restore one, and reconcile a store with Kafka."""
