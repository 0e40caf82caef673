"""An Apache Kafka broker as a child process: its jars, its configuration, its storage, its start and its end."""
