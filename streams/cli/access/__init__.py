"""Commands that say and set who may do what: ACLs of the broker, policies of the store."""
