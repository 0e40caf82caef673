"""The learner and scorer roles: Kafka records in, work done, events out."""
