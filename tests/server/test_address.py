"""An address that cannot be listened on is one line, before a model is loaded."""

from __future__ import annotations

import socket

import pytest

from headrace.cli.main import _run
from headrace.errors import UserError
from headrace.server.address import bound
from tests.exports import Exports


def test_a_free_port_is_the_same_for_all_addresses_of_a_name() -> None:
    sockets = bound("localhost", 0)
    try:
        assert len({one.getsockname()[1] for one in sockets}) == 1
        assert sockets[0].getsockname()[1] > 0
    finally:
        for one in sockets:
            one.close()


def test_a_port_that_is_taken(exports: Exports, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert _run(["serve", str(exports.bundle()), "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert told == f"error: port {port} of 127.0.0.1 is taken; choose another --port, or 0 for a free one\n"


@pytest.mark.parametrize("host", ["nowhere.invalid", "a" * 64 + ".invalid", "\udcff"])
def test_a_host_that_is_none(host: str) -> None:
    with pytest.raises(UserError, match=r"is not known .*expected an address of this computer"):
        bound(host, 0)


def test_an_address_of_another_computer() -> None:
    with pytest.raises(UserError, match=r"192\.0\.2\.1, port 0, cannot be listened on .*choose another --host"):
        bound("192.0.2.1", 0)  # set aside for documentation (RFC 5737)


def test_a_bundle_that_is_none_is_told_before_another_is_loaded(
    exports: Exports, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(["serve", str(exports.bundle()), "no.bundle", "--port", "0"]) == 2
    assert capsys.readouterr().err == "error: no.bundle is no folder; expected one made by: headrace export\n"
