"""All that speaks Kafka; never imports torch."""
