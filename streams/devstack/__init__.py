"""A development stack on one machine: an embedded Kafka, MinIO, and the roles as processes."""
