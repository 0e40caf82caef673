"""Taking versions out of service: rollback and revocation."""
