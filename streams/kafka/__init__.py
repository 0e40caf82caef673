"""Topics, connections and consumer groups: what every role needs to speak Kafka."""
