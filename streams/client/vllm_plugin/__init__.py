"""The plugin of vLLM: it finds adapters by name in the object store, and keeps the names at the newest version.

`registration` has the entry points. No module here imports vLLM at import time, and none needs torch.
"""
