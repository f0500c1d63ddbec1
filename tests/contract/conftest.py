import pytest

# Contracts are plain modules that the tests inherit from: their asserts shall explain themselves too.
pytest.register_assert_rewrite(
    *(f"contract.{name}" for name in ("oip", "conformance", "extensions", "rules", "target"))
)
