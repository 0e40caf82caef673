"""TLS and SASL towards Kafka: the options of each client, and a trial that names the setting which a refusal is about."""
