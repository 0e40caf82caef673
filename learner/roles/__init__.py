"""The learner and scorer roles: consume records from Kafka, run the model, publish events."""
