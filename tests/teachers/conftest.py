"""What the tests of teachers/ share."""

from __future__ import annotations

from pathlib import Path

import pytest

from teachers.fetch import default_cache

REAL_CACHE = default_cache()  # before a test points it elsewhere


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered about files must not travel from test to test."""
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def nasty() -> list[str]:
    """Texts on which tokenizers differ if anything about them does."""
    invalid = b"caf\xe9 \xff\xfe \xf0\x9f\x98".decode("utf-8", errors="replace")
    return [
        "In 2023, 1234567 sheep; 3.14159 and 0x1F, ½ and x² and ٣٤.",
        "a  12\n\n1. one\n  2. two\t3\r\n4",
        "emoji 🐑🐏 👩‍👩‍👧‍👦 🇨🇭 e\u0301 é",
        "def f(x):\n    return {'a': [x**2, \"b\"]}  # I'LL'd we've\n\n\n\tif x != 0: pass",
        "美洲驼是一种动物。二〇二三年,剪毛。 カタカナ 한국어 العربية עברית",
        "   leading and trailing   \n\n   \u00a0\u2003\u200b end ",
        invalid,
        "",
        " ",
        "x" * 300,
    ]


@pytest.fixture(scope="session")
def real_cache() -> Path:
    """The cache of this machine's user, where large downloads may already lie."""
    return REAL_CACHE
