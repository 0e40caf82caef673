"""Who serves what: the records of subscribers on `adapter-acks`, their leases, and what reads them."""
