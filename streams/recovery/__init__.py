"""Bring a restored store and Kafka together: positions, requests to forget, generations, waiting jobs."""
