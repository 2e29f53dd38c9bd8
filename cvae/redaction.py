"""Keeps passwords out of everything that is written or shown: reports, plans, logs, errors."""

import logging
import os
import re
import sys
import traceback
from types import TracebackType
from urllib.parse import unquote, unquote_plus, urlsplit

_MASK = "***"
# user:password@ of a URI. A password that was not percent-encoded may contain "@", ":", "/" or "?":
# it extends to the last "@" of the word, but not into a second URI.
_USER_INFO = re.compile(r"(://[^\s:/@?#]*):(?:(?!://)\S)*@")
# In a text with a single URI, the password may also contain spaces; a port number is no password.
_WITH_SPACES = re.compile(r"(://[^\s:/@?#]*):(?!\d{1,5}[\s/]).*@", re.DOTALL)
# A token alone before "@", which some servers accept as the user's name.
_TOKEN = re.compile(r"(https?://)[^\s:/@?#]+@", re.IGNORECASE)
_SECRET_NAME = r"[\w.-]*(?:pass(?:word|wd|phrase)?|pwd|secret|token|api[_-]?key|access[_-]?key)"
_EQUALS, _VALUE = r"(?:=|%3[Dd])", r"(?:(?!%3[Bb]|%26)[^\s&;#\"'])+"
_PARAMETER = re.compile(rf"((?:[?&;]|%3[Bb]|%26){_SECRET_NAME}{_EQUALS}){_VALUE}", re.IGNORECASE)
# "host=db password=x" and "Driver=x;PWD=y", as PostgreSQL and ODBC write them.
_SETTING = re.compile(rf"(\b(?:password|passwd|pwd){_EQUALS}){_VALUE}", re.IGNORECASE)
_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_SHORTEST_SECRET = 3  # shorter ones are part of too many ordinary words


def without_password(text: str) -> str:
    """Returns a URI, or a text that quotes URIs, with *** for every password and token in it.

    It masks user:password@host, passwords that should have been percent-encoded but are not, and
    parameters such as ?password=….
    """
    if text.count("://") == 1:
        text = _WITH_SPACES.sub(rf"\1:{_MASK}@", text)
    text = _USER_INFO.sub(rf"\1:{_MASK}@", text)
    text = _TOKEN.sub(rf"\1{_MASK}@", text)
    return _SETTING.sub(rf"\1{_MASK}", _PARAMETER.sub(rf"\1{_MASK}", text))


def without_secrets(text: str) -> str:
    """Returns a text, such as a library's error or a traceback, without the secrets of MLflow's settings.

    In addition to without_password(), it masks the configured password anywhere in the text, whole,
    decoded or in pieces: a library that misreads a URI may quote a part of it as the port or host.
    """
    text = without_password(text)
    for secret in sorted(_configured_secrets(), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", _MASK, text)
    return text


def holds_password(name: str, value: str) -> bool:
    """Returns whether an environment variable of that name and value contains a password."""
    return _is_secret(name) or without_password(value) != value


def guard_output() -> None:
    """Masks secrets in all further log lines, warnings and tracebacks of this process."""
    logging.captureWarnings(True)
    for handler in filter(None, [*logging.getLogger().handlers, logging.lastResort]):
        handler.setFormatter(_Formatter(handler.formatter))
    sys.excepthook = _print_exception


class _Formatter(logging.Formatter):
    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(self._inner.format(record))


def _print_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    sys.stderr.write(without_secrets("".join(traceback.format_exception(kind, error, trace))))


def _is_secret(name: str) -> bool:
    return re.fullmatch(_SECRET_NAME, name, re.IGNORECASE) is not None


def _configured_secrets() -> set[str]:
    """Returns the secrets in MLflow's environment variables, in each form that a text may quote."""
    secrets = {os.environ.get(name, "") for name in _VARIABLES}
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    user, colon, password = uri.partition("://")[2].rpartition("@")[0].partition(":")
    if colon and "/" not in user:
        secrets |= {password, *re.split(r"[@:/?#]", password)}
    try:
        query = urlsplit(uri).query
    except ValueError:  # a malformed address, such as one with an unclosed bracket
        query = uri.partition("?")[2]
    parameters = (part.partition("=") for part in query.split("&"))
    secrets |= {value for name, _, value in parameters if _is_secret(name)}
    secrets |= {decode(secret) for secret in secrets for decode in (unquote, unquote_plus)}
    return {secret for secret in secrets if len(secret) >= _SHORTEST_SECRET}
