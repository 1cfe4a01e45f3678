"""Salts: no two combinations of what must not be mixed give the same one."""

from __future__ import annotations

import itertools

from vllm_mlx.core.prompt import prompt_salt, tenant_key


def test_prompt_without_parts_has_no_salt() -> None:
    assert prompt_salt() == b""


def test_different_parts_never_give_the_same_salt() -> None:
    texts = ("", "a", "ab", "b", "\0\0\0\1b", "a\0\0\0\1b")
    salts = [prompt_salt(adapter=one, tenant=two.encode()) for one, two in itertools.product(texts, texts)]
    assert len(set(salts)) == len(salts)


def test_tenant_key_is_short_and_depends_on_the_whole_name() -> None:
    names = ("", "a", "A", "a" * 5000, "a" * 5001, "Köln")
    keys = {tenant_key(name) for name in names}
    assert len(keys) == len(names)
    assert {len(key) for key in keys} == {16}
