"""The client library: publish events, and subscribe to adapter versions. Needs neither Faust nor torch."""
