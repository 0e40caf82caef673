"""Keep language models learning from Kafka, and make them forget on request."""
