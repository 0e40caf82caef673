"""All that speaks Kafka. Never imports torch."""
