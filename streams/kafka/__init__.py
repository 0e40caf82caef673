"""Topics, connections, consumer groups and producers: the Kafka code that the roles share."""
