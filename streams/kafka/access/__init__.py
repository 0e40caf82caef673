"""Who may do what at the broker: one table, the ACLs that follow from it, and their comparison with a broker's."""
