"""Who may do what in the store: one table, the S3 policies that follow from it, and a MinIO server's accounts."""
