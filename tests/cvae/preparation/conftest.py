from tests.cvae.data.conftest import small_bert

__all__ = ["small_bert"]
