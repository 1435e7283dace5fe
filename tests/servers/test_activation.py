"""When an adapter is active, when it stays out, and what it says then."""

import dataclasses
import logging

import pytest

from dsv4x.servers import activation
from dsv4x.servers.activation import Mismatch, Required, Server


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for variable in ("DSV4X_SERVERS", "DSV4X_SERVERS_EXPLAIN", "DSV4X_TESTED"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def server():
    return Server("Tested", "torch", ("2.",), "DSV4X_TESTED")


@pytest.fixture
def installed():
    return []


def register(server, installed, error=None):
    def install():
        if error is not None:
            raise error
        installed.append(True)

    return server.register(install)


@pytest.mark.parametrize(
    ("said", "switch"), [("", "measured"), ("1", "measured"), ("0", "off"), ("all", "all"), (" ALL ", "all")]
)
def test_the_switch(said, switch, server, monkeypatch):
    monkeypatch.setenv("DSV4X_TESTED", said)
    assert server.switch == switch


def test_a_switch_that_nobody_knows_stays_out_with_what_was_said(server, installed, monkeypatch, caplog):
    monkeypatch.setenv("DSV4X_TESTED", "on")
    assert not register(server, installed)
    assert "DSV4X_TESTED='on', need 0, 1 or all" in caplog.text


def test_a_known_version_is_installed(server, installed):
    assert register(server, installed)
    assert installed


def test_switched_off_it_is_not_installed_and_says_so_quietly(server, installed, monkeypatch, caplog):
    monkeypatch.setenv("DSV4X_TESTED", "0")
    with caplog.at_level(logging.INFO):
        assert not register(server, installed)
    assert not installed
    assert [(record.levelname, "DSV4X_TESTED=0" in record.message) for record in caplog.records] == [("INFO", True)]


@pytest.mark.parametrize(
    ("distribution", "versions", "reason"),
    [
        ("torch", ("1.0", "1.1"), "need 1.0 or 1.1"),
        ("no-such-distribution", ("1.0",), "no-such-distribution is not installed, need 1.0"),
    ],
)
def test_another_version_stays_out_loudly(distribution, versions, reason, installed, caplog):
    server = Server("Tested", distribution, versions, "DSV4X_TESTED")
    assert not register(server, installed)
    assert not installed
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert reason in caplog.text
    assert "whose own attention runs" in caplog.text


@pytest.mark.parametrize("versions", [("0.5.23",), ("0.5.2.",), ("0.5.2",)])
def test_a_version_is_matched_whole(versions, monkeypatch):
    server = Server("Tested", "torch", versions, "DSV4X_TESTED")
    monkeypatch.setattr(Server, "version", "0.5.23+local")
    if versions == ("0.5.23",):
        server.check_version()
    else:
        with pytest.raises(Mismatch, match=r"torch is 0\.5\.23\+local"):
            server.check_version()


@pytest.mark.parametrize("error", [Mismatch("field x is gone"), RuntimeError("no driver"), ImportError("gone")])
def test_what_goes_wrong_is_the_reason(error, server, installed, caplog):
    assert not register(server, installed, error)
    assert str(error) in caplog.text
    assert ("Mismatch" in caplog.text) is False
    assert (type(error).__name__ in caplog.text) is not isinstance(error, Mismatch)


def test_required_it_stops_the_server_even_where_exceptions_are_swallowed(server, installed, monkeypatch):
    monkeypatch.setenv("DSV4X_SERVERS", "require")
    assert not issubclass(Required, Exception)
    with pytest.raises(Required, match=r"DSV4X_SERVERS=require, but dsv4x stays out of Tested.*gone"):
        register(server, installed, Mismatch("gone"))


def test_required_and_switched_off_is_a_contradiction(server, installed, monkeypatch):
    monkeypatch.setenv("DSV4X_SERVERS", "require")
    monkeypatch.setenv("DSV4X_TESTED", "0")
    with pytest.raises(Required, match="DSV4X_TESTED=0"):
        register(server, installed)


def test_a_misspelt_require_is_no_silence(monkeypatch):
    monkeypatch.setenv("DSV4X_SERVERS", "requier")
    with pytest.raises(Required, match="'requier', need require or nothing"):
        activation.required()


def test_a_line_is_said_once(server, caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            server.live("attention")
    assert [record.message for record in caplog.records] == [f"dsv4x is live in Tested {server.version}: attention"]


def test_without_a_handler_a_warning_goes_to_stderr(server, monkeypatch, capsys):
    logger = logging.getLogger("dsv4x.servers.tested")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(server, "logger", logger.name)
    server.stay_out("nothing fits")
    assert "WARNING: dsv4x stays out of Tested" in capsys.readouterr().err


def test_the_table_is_printed_once_where_that_is_asked_for(server, monkeypatch, capsys):
    server.explain("a table")
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("DSV4X_SERVERS_EXPLAIN", "1")
    for _ in range(2):
        server.explain("a table")
    assert capsys.readouterr().out == "dsv4x in Tested, DSV4X_TESTED says measured; a table\n"


@dataclasses.dataclass
class Theirs:
    field: int
    late: int = dataclasses.field(init=False)

    annotated: float

    def method(self, a, *args, b=1, **kwargs):
        self.made = a


def test_expected_parameters():
    activation.expect_parameters(Theirs, "method", ("self", "a", "*args", "b", "**kwargs"))
    with pytest.raises(Mismatch, match=r"Theirs\.method takes \(self, a, \*args, b, \*\*kwargs\), need \(self, a\)"):
        activation.expect_parameters(Theirs, "method", ("self", "a"))
    with pytest.raises(Mismatch, match="Theirs has no gone"):
        activation.expect_parameters(Theirs, "gone", ())


def test_expected_attributes():
    activation.expect_attributes(Theirs, ("field", "late", "annotated", "method"))
    with pytest.raises(Mismatch, match="Theirs has no gone, lost"):
        activation.expect_attributes(Theirs, ("field", "gone", "lost"))


def test_expected_attributes_of_an_object():
    made = Theirs(1, 2.0)
    with pytest.raises(Mismatch, match=r"a .*Theirs has no made"):
        activation.expect_instance_attributes(made, ("field", "made"))
    made.method(1)
    activation.expect_instance_attributes(made, ("field", "made"))
