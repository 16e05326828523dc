"""Who may connect: networks of every kind, and subjects that can't be made to look like others."""

from __future__ import annotations

import pytest

from nbdmirror.errors import UsageError
from nbdmirror.server.access import EVERYBODY, Access, distinguished_name, parse_network


def networks(*texts: str) -> Access:
    return Access(networks=tuple(map(parse_network, texts)))


def test_without_lists_everybody_is_admitted() -> None:
    assert EVERYBODY.admits_address("192.0.2.1")
    assert EVERYBODY.admits_subject("")


@pytest.mark.parametrize("address", ["192.0.2.0", "192.0.2.255", "2001:db8::1", "::ffff:192.0.2.7", "198.51.100.1"])
def test_addresses_of_any_listed_network_are_admitted(address: str) -> None:
    assert networks("192.0.2.0/24", "2001:db8::/32", "198.51.100.1").admits_address(address)


@pytest.mark.parametrize("address", ["192.0.3.0", "192.0.1.255", "2001:db9::", "::1", "::ffff:192.0.3.1", "198.51.100.2"])
def test_other_addresses_are_not(address: str) -> None:
    assert not networks("192.0.2.0/24", "2001:db8::/32", "198.51.100.1").admits_address(address)


@pytest.mark.parametrize("text", ["", "host", "192.0.2.1/24", "192.0.2.0/33", "192.0.2", "2001:db8::/129"])
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no network"):
        parse_network(text)


def test_a_name_is_written_most_specific_first() -> None:
    subject = ((("countryName", "GB"),), (("organizationName", "Us"),), (("commonName", "me"), ("userId", "7")))
    assert distinguished_name(subject) == "CN=me+UID=7,O=Us,C=GB"
    assert distinguished_name(((("pseudonym", "x"),),)) == "pseudonym=x"
    assert distinguished_name(()) == ""


@pytest.mark.parametrize("value", ["me,O=Us", "me+O=Us", 'a"b', "a\\", "a;b", "<a>", " a", "a ", "#a", "a=b"])
def test_a_value_cannot_pose_as_several(value: str) -> None:
    name = distinguished_name(((("commonName", value),),))
    special = [at for at, letter in enumerate(name) if letter == "\\"]
    assert special
    assert not Access(subjects=("CN=me,O=Us*", "CN=me+O=Us*")).admits_subject(name)


def test_nul_in_a_name_is_visible() -> None:
    assert distinguished_name(((("commonName", "me\0.example"),),)) == "CN=me\\00.example"


@pytest.mark.parametrize("pattern", ["CN=me,O=Us", "CN=*,O=Us", "*", "CN=m?,O=*"])
def test_subjects_that_match_are_admitted(pattern: str) -> None:
    assert Access(subjects=("CN=you", pattern)).admits_subject("CN=me,O=Us")


@pytest.mark.parametrize("pattern", ["CN=me", "CN=ME,O=US", "O=Us", "CN=me,O=U", "", "CN=me,O=Us,C=GB"])
def test_other_subjects_are_not(pattern: str) -> None:
    assert not Access(subjects=("CN=you", pattern)).admits_subject("CN=me,O=Us")


def test_no_certificate_matches_no_list_of_subjects() -> None:
    assert not Access(subjects=("CN=*",)).admits_subject("")
