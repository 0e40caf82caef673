"""Backends for serving engines that run as servers of their own: vLLM and SGLang."""
