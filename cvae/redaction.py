"""Passwords are kept out of everything that is written or shown: reports, plans, logs, errors."""

import logging
import os
import re
import sys
from types import TracebackType
from urllib.parse import unquote, unquote_plus, urlsplit

_MASK = "***"
# user:password@ of a URI. A password that was not percent-encoded may hold "@", ":", "/" or "?": up to the last
# "@" of the word, but not into a second URI.
_USER_INFO = re.compile(r"(://[^\s:/@?#]*):(?:(?!://)\S)*@")
# In a text with one URI its password may hold blanks, too; a port is none.
_WITH_BLANKS = re.compile(r"(://[^\s:/@?#]*):(?!\d{1,5}[\s/]).*@", re.DOTALL)
# A token that stands alone before "@": some servers take it for the user's name.
_TOKEN = re.compile(r"(https?://)[^\s:/@?#]+@", re.IGNORECASE)
_SECRET_NAME = r"[\w.-]*(?:pass(?:word|wd|phrase)?|pwd|secret|token|api[_-]?key|access[_-]?key)"
_EQUALS, _VALUE = r"(?:=|%3[Dd])", r"(?:(?!%3[Bb]|%26)[^\s&;#\"'])+"
_PARAMETER = re.compile(rf"((?:[?&;]|%3[Bb]|%26){_SECRET_NAME}{_EQUALS}){_VALUE}", re.IGNORECASE)
# As in "host=db password=x" and "Driver=x;PWD=y", the ways of PostgreSQL and ODBC.
_SETTING = re.compile(rf"(\b(?:password|passwd|pwd){_EQUALS}){_VALUE}", re.IGNORECASE)
_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
# A shorter piece stands in too many ordinary words.
_LEAST_SECRET = 3


def without_password(text: str) -> str:
    """Returns a URI, or a text that quotes URIs, with *** for every password and token in it.

    It covers user:password@host, passwords that should have been percent-encoded and are not, and
    parameters such as ?password=…. What is without a password is returned as it is.
    """
    if text.count("://") == 1:
        text = _WITH_BLANKS.sub(rf"\1:{_MASK}@", text)
    text = _USER_INFO.sub(rf"\1:{_MASK}@", text)
    text = _TOKEN.sub(rf"\1{_MASK}@", text)
    return _SETTING.sub(rf"\1{_MASK}", _PARAMETER.sub(rf"\1{_MASK}", text))


def without_secrets(text: str) -> str:
    """Returns others' words, as of an exception or a traceback, without any secret of MLflow's settings.

    Besides what without_password() finds it masks the configured password wherever it stands, whole, decoded
    or in pieces: a library that misreads a URI may take a part of the password for the port or the host.
    """
    text = without_password(text)
    for secret in sorted(_configured(), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", _MASK, text)
    return text


def holds_password(name: str, value: str) -> bool:
    """Returns whether an environment variable of that name and value holds a password."""
    secret = re.fullmatch(_SECRET_NAME, name, re.IGNORECASE) is not None
    return secret or without_password(value) != value


def guard_output() -> None:
    """From here on this process's log, warnings and tracebacks are written without secrets."""
    logging.captureWarnings(True)
    for handler in filter(None, [*logging.getLogger().handlers, logging.lastResort]):
        handler.setFormatter(_Formatter(handler.formatter))
    sys.excepthook = _print_without_secrets


class _Formatter(logging.Formatter):
    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(self._inner.format(record))


def _print_without_secrets(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    import traceback

    sys.stderr.write(without_secrets("".join(traceback.format_exception(kind, error, trace))))


def _configured() -> set[str]:
    """The secrets in MLflow's environment variables, in every form in which they may be quoted."""
    found = {os.environ.get(name, "") for name in _VARIABLES}
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    _, _, rest = uri.partition("://")
    user, colon, password = rest.rpartition("@")[0].partition(":")
    if colon and "/" not in user:
        found |= {password, *re.split(r"[@:/?#]", password)}
    for name, value in _parameters(uri):
        if re.fullmatch(_SECRET_NAME, name, re.IGNORECASE):
            found.add(value)
    found |= {unquote(secret) for secret in found} | {unquote_plus(secret) for secret in found}
    return {secret for secret in found if len(secret) >= _LEAST_SECRET}


def _parameters(uri: str) -> list[tuple[str, str]]:
    try:
        query = urlsplit(uri).query
    except ValueError:  # a malformed address, as of brackets that are not closed
        query = uri.partition("?")[2]
    pairs = (part.partition("=") for part in query.split("&"))
    return [(name, value) for name, _, value in pairs]
