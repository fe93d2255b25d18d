"""How a service says where it is reached."""

import pytest

from headrace.common.http.addresses import listen, socket_url


def test_a_service_on_all_addresses_is_reached_where_it_is_told_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere, here = listen("0.0.0.0", 0), listen("127.0.0.1", 0)
    with everywhere, here:
        monkeypatch.setenv("HEADRACE_ADVERTISED_HOST", "10.1.2.3")
        assert socket_url(everywhere) == f"http://10.1.2.3:{everywhere.getsockname()[1]}"
        assert socket_url(here) == f"http://127.0.0.1:{here.getsockname()[1]}"
        monkeypatch.delenv("HEADRACE_ADVERTISED_HOST")
        assert not socket_url(everywhere).startswith("http://10.1.2.3")
