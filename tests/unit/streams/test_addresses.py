"""Addresses: what a URL of a server on this machine looks like, and which hosts are this machine."""

from __future__ import annotations

import pytest

from perennial.streams.addresses import direct_opener, http_url, is_loopback


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:9/x"), ("127.0.0.2", "http://127.0.0.2:9/x"), ("", "http://127.0.0.1:9/x"),
        ("0.0.0.0", "http://127.0.0.1:9/x"), ("::", "http://[::1]:9/x"), ("[::1]", "http://[::1]:9/x"),
        ("::1", "http://[::1]:9/x"), ("metrics.local", "http://metrics.local:9/x"),
    ],
)  # fmt: skip
def test_case_17_a_server_is_reached_at_the_address_it_listens_on(host, url):
    assert http_url(host, 9, "/x") == url


def test_hosts_of_this_machine():
    assert all(map(is_loopback, ("localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1", "[::1]", "a.localhost")))
    assert not any(map(is_loopback, ("", "10.0.0.1", "localhost.example", "::", "0.0.0.0", "mirror")))


def test_case_09_the_direct_opener_has_no_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert not any("proxy" in type(handler).__name__.lower() for handler in direct_opener().handlers)
