"""Metal text to C++: what is refused before any compiler sees it, and what becomes what."""

from __future__ import annotations

import pytest
from runner.metal.tokens import NotMetalError
from runner.metal.translate import translate

SIGNATURE = "[[kernel]] void k(const device float* x [[buffer(0)]], device float* y [[buffer(1)]]) {"


def cpp(body: str, before: str = "") -> str:
    return translate(f"{before}\n{SIGNATURE}\n{body}\n}}\n")


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("double a = 1.0;", "'double' does not exist"),
        ("float a = 1.0l;", "long double"),
        ("auto f = [](float v) { return v; };", "no lambda"),
        ("float* p;", r"'float\*' needs an address space"),
        ("const half* p = 0;", r"'half\*' needs an address space"),
        ("unsigned int& r = a;", "'unsigned&' needs an address space"),
        ("goto end;", "'goto' does not exist"),
        ("float a = std::max(1.f, 2.f);", "'std' does not exist"),
        ("float a = __builtin_expf(1.f);", "'__builtin_expf' does not exist"),
        ("int kernel = 1;", "'kernel' is a keyword"),
        ("device float a;", "cannot live in device memory"),
        ("threadgroup float a = 1.f;", "only names and sizes"),
        ("thread float** p;", "pointers to pointers"),
        ("device auto* p = x;", "a type was expected after 'device'"),
    ],
)
def test_what_metal_has_not_is_refused_with_its_line(body: str, message: str) -> None:
    with pytest.raises(NotMetalError, match=rf"^line 3: .*{message}"):
        cpp(body)


def test_pointer_to_a_template_parameter_needs_an_address_space() -> None:
    with pytest.raises(NotMetalError, match=r"line 1: 'T\*' needs an address space"):
        cpp("", "template <typename T> T first(const T* p) { return p[0]; }")


def test_line_of_a_refusal_is_that_of_the_text_before_macros_were_replaced() -> None:
    with pytest.raises(NotMetalError, match=r"^line 41: 'double'"):
        translate(f'{SIGNATURE}\n# 40 "kernel"\nfloat a;\ndouble b; }}')


def test_address_spaces_become_types() -> None:
    text = flat(cpp("const device uint4* p = (const device uint4*)(x + 4); thread float* q = a;"))
    assert "::emulated::pointer<::emulated::device, const uint4> p = (" in text
    assert "= ( ::emulated::pointer<::emulated::device, const uint4> )(x + 4)" in text.replace("(::", "( ::")
    assert " float* q = a;" in text


def test_address_of_an_element_keeps_its_space() -> None:
    text = flat(cpp("const device float* p = &x[a[i] + 1]; int n = (a) & b[1]; int m = c & d[2];"))
    assert "::emulated::address(x, a[i] + 1)" in text
    assert "(a) & b[1]" in text
    assert "c & d[2]" in text


def test_address_behind_a_cast_is_unary() -> None:
    assert "::emulated::address(x, 4)" in flat(cpp("const device uint4* p = (const device uint4*)&x[4];"))


def test_threadgroup_variables_are_known_by_name() -> None:
    text = flat(cpp("threadgroup float a[2][SIZE], b; threadgroup float* p = a[1];"))
    assert '= float[2][SIZE]; auto&& a = ::emulated::shared<emulated_type_0>(0, "a")' in text
    assert '= float; auto&& b = ::emulated::shared<emulated_type_1>(1, "b")' in text
    assert "::emulated::pointer<::emulated::threadgroup, float> p = a[1];" in text


def test_literals_are_floats_halves_and_bfloats() -> None:
    text = flat(cpp("float a = 1.0 + 2e3 + .5 + 1.f; half b = 1.5h; bfloat c = 2.0bf; int d = 12 + 0x1e;"))
    assert "1.0f + 2e3f + .5f + 1.f" in text
    assert "::half(1.5f)" in text
    assert "::bfloat(2.0f)" in text
    assert "12 + 0x1e" in text


def test_lines_stay_where_they_are() -> None:
    body = "threadgroup float\n  a\n [4];\nconst\n device float *\np = x;\nHERE"
    assert cpp(body).splitlines()[8].strip() == "HERE"


def test_kernel_is_called_with_its_buffers_and_attributes() -> None:
    text = translate(
        "[[kernel]] void k(const constant int& n [[buffer(0)]], device float* y [[buffer(1)]],\n"
        "  uint lane [[thread_index_in_simdgroup]], uint3 at [[thread_position_in_grid]]) {}\n"
    )
    assert "num_arguments = 2;" in text
    assert "::k(::emulated::buffer(buffers[0]), ::emulated::buffer(buffers[1]), attributes.index_in_simdgroup, " in text


def test_two_kernels_in_a_text_are_refused() -> None:
    with pytest.raises(NotMetalError, match="2 functions"):
        translate(f"{SIGNATURE}}}\n{SIGNATURE}}}\n")


def test_unknown_attribute_is_refused() -> None:
    with pytest.raises(NotMetalError, match="no such attribute"):
        translate("[[kernel]] void k(uint v [[vertex_id]]) {}")
