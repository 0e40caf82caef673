"""Object stores: the protocol, a folder, S3; keys, digests, content-addressed blobs."""
