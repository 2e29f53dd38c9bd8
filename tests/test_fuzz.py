"""A few of the inputs that `python -m tests.fuzz` makes by the thousand."""

import pytest

from tests.fuzz import targets
from tests.fuzz.frame import fuzz


# Models need imports of seconds.
@pytest.mark.parametrize("name", [name for name in targets.ALL if name != "models"])
def test_bad_input_is_one_line(name: str) -> None:
    assert list(fuzz(name, cases=60, seed=1)) == []
