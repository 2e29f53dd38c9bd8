"""No password leaves the process, whatever the URI looks like."""

import subprocess
import sys

import pytest

from cvae.redaction import without_password, without_secrets

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (f"http://ann:{SECRET}@host:5000/path", "http://ann:***@host:5000/path"),
        (f"https://:{SECRET}@host", "https://:***@host"),
        (f"https://{SECRET}@host/x", "https://***@host/x"),
        (f"postgresql://ann:{SECRET}@db/mlflow", "postgresql://ann:***@db/mlflow"),
        (f"mysql+pymysql://ann:%40{SECRET}%2F@db:3306/m", "mysql+pymysql://ann:***@db:3306/m"),
        (f"postgresql://ann:p@{SECRET}:x@db/m", "postgresql://ann:***@db/m"),
        (f"postgresql://ann:{SECRET}/a?b#c@db/m", "postgresql://ann:***@db/m"),
        (f"postgresql://ann:a {SECRET} b@db/m", "postgresql://ann:***@db/m"),
        (
            f"postgresql://db/m?user=ann&password={SECRET}",
            "postgresql://db/m?user=ann&password=***",
        ),
        (f"postgresql://db/m?sslpassword={SECRET}&x=1", "postgresql://db/m?sslpassword=***&x=1"),
        (
            f"mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3D{SECRET}%3BUID%3Dann",
            "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3D***%3BUID%3Dann",
        ),
    ],
)
def test_a_uri_is_shown_without_its_password(uri: str, shown: str) -> None:
    assert without_password(uri) == shown
    assert without_password(shown) == shown, "a URI that was masked before"
    assert SECRET not in without_password(f"MLflow at {uri} does not answer")
    if " " not in uri:
        assert SECRET not in without_password(f"Failed to parse: '{uri}/api/2.0', twice {uri}")


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/ann/a:b@c/mlflow.db",
        "http://127.0.0.1:5000/#/experiments/1",
        "postgresql://ann@db/mlflow",
        "python workflows/launch.py configs/demo.yaml data.max_tokens=5",
        "http://127.0.0.1:5000 serves it; ask ann@host",
        "ann@host: a note at 12:30",
    ],
)
def test_a_text_without_password_is_unchanged(text: str) -> None:
    assert without_password(text) == text


def test_pieces_of_secrets_are_masked_in_a_librarys_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:one%40two/three@host?token=four4")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "five5")
    message = "no port 'one%40two', 'one@two', host three@host, four4 and five5; threesome"
    assert without_secrets(message) == "no port '***', '***', host ***@host, *** and ***; threesome"


def test_logs_warnings_and_tracebacks_are_masked() -> None:
    program = f"""
import logging, os, warnings
from cvae.redaction import guard_output
os.environ["MLFLOW_TRACKING_URI"] = "http://ann:{SECRET}@host"
logging.basicConfig(level=logging.INFO, format="%(message)s")
guard_output()
logging.info("asks http://ann:{SECRET}@host")
warnings.warn("of {SECRET}")
try:
    raise ValueError("{SECRET}")
except ValueError:
    logging.exception("failed")
raise RuntimeError("port '{SECRET}'")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    output = done.stdout + done.stderr.replace(f'warnings.warn("of {SECRET}")', "")
    assert done.returncode == 1
    assert SECRET not in output
    for words in (
        "asks http://ann:***@host",
        "of ***",
        "ValueError: ***",
        "RuntimeError: port '***'",
    ):
        assert words in output
